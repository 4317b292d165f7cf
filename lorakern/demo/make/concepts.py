"""What the base model is taught: concepts, styles, colours, and what is held out of the training.

A concept is named by its CLDR label; `label=word` gives it a shorter name in captions. Labels that
hold a colour ("red apple") are always renamed, so that a colour word means a colour, nothing else.
"""

import zlib

STYLES = {"noto": "noto emoji style", "flat": "flat emoji style", "3d": "3d emoji style"}
HELD_OUT_STYLE = "notov1"

HELD_OUT = [
    *["koala", "owl", "octopus", "penguin", "unicorn", "snowman", "guitar", "crown", "rocket"],
    *["pineapple", "hamburger", "bicycle", "cactus", "trophy", "telescope", "sailboat", "turtle"],
    *["tulip", "camera", "doughnut"],
]

_TABLE = """
dog face=dog; cat face=cat; tiger face=tiger; horse face=horse; cow face=cow; pig face=pig
mouse face=mouse; rabbit face=rabbit; monkey face=monkey; fox; bear; panda; lion; wolf; frog
chicken; baby chick=chick; duck; eagle; flamingo; parrot; elephant; giraffe; hedgehog; bat; snake
crocodile; spouting whale=whale; dolphin; fish; tropical fish; shark; crab; lobster; shrimp; snail
butterfly; honeybee=bee; lady beetle=ladybug; spider; sauropod=dinosaur; spiral shell=shell; rose
sunflower; cherry blossom; deciduous tree=tree; palm tree; four leaf clover=clover; maple leaf
mushroom; grapes; watermelon; tangerine; lemon; banana; mango; red apple=apple; pear; peach
cherries; strawberry; kiwi fruit=kiwi; tomato; avocado; eggplant; carrot; ear of corn=corn
hot pepper=pepper; cucumber; broccoli; bread; croissant; pretzel; pancakes; cheese wedge=cheese
poultry leg=chicken leg; french fries; pizza; hot dog; taco; popcorn; rice ball; ice cream; cookie
birthday cake; cupcake; pie; chocolate bar; candy; lollipop; honey pot; hot beverage=coffee
wine glass; cocktail glass; beer mug=beer; house; tent; bus; ambulance; fire engine=fire truck
taxi; automobile=car; delivery truck=truck; tractor; motor scooter=scooter; helicopter; airplane
anchor; vertical traffic light=traffic light; flying saucer; watch; alarm clock
crescent moon=moon; sun; star; cloud; rainbow; umbrella; high voltage=lightning; snowflake; fire
droplet; jack-o-lantern=pumpkin; Christmas tree; balloon; wrapped gift=gift; soccer ball
basketball; baseball; crystal ball; teddy bear; bullseye=target; puzzle piece; glasses; sunglasses
necktie=tie; t-shirt; jeans; socks; dress; backpack; running shoe=sneaker; high-heeled shoe
top hat; ring; gem stone=gem; bell; headphone=headphones; drum; laptop; television
magnifying glass tilted left=magnifying glass; candle; light bulb; closed book=book; coin
envelope; package=box; pencil; scissors; locked=padlock; key; hammer; shield; gear; magnet; pill
door; chair; bomb; red heart=heart; ghost; robot; skull
"""


def concepts() -> dict[str, str]:
    """CLDR label -> name in captions, for every trained concept, in a fixed order."""
    entries = (entry.strip() for entry in _TABLE.replace("\n", ";").split(";"))
    pairs = (entry.partition("=") for entry in entries if entry)
    return {label: name or label.lower() for label, _, name in pairs}


def is_held_out(label: str) -> bool:
    """Whether a CLDR label names a held-out concept or a relative of one ("camera with flash")."""
    return bool(set(label.lower().replace("-", " ").split()) & set(HELD_OUT))


# colour word -> hue in degrees, factor on saturation, exponent on value
OBJECT_COLOURS = {
    "red": (357.0, 1.15, 0.8),
    "orange": (28.0, 1.1, 0.55),
    "yellow": (51.0, 1.0, 0.45),
    "green": (128.0, 0.95, 1.1),
    "blue": (216.0, 1.05, 0.8),
    "purple": (276.0, 0.9, 0.9),
    "pink": (332.0, 0.6, 0.5),
}

GROUND_COLOURS = {
    "red": (226, 60, 58),
    "orange": (250, 150, 50),
    "yellow": (252, 218, 70),
    "green": (90, 190, 95),
    "blue": (70, 135, 235),
    "purple": (150, 90, 205),
    "pink": (250, 165, 200),
    "black": (25, 25, 28),
    "gray": (150, 152, 156),
}


def colour_held_out(name: str, colour: str, kind: str) -> bool:
    """Whether the pair (concept, colour) is never shown; about 1 in 5, fixed by a checksum.

    Args:
        name: the concept's name in captions.
        colour: a key of OBJECT_COLOURS or GROUND_COLOURS.
        kind: "object" or "ground".
    """
    return zlib.crc32(f"{kind}/{name}/{colour}".encode()) % 5 == 0


def article(words: str) -> str:
    """'a red car', 'an apple': the words with their article, plurals in -s without one."""
    if words.split()[-1] in _PLURALS:
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


_PLURALS = {
    *["grapes", "cherries", "pancakes", "fries", "glasses", "sunglasses", "jeans", "socks"],
    *["headphones", "scissors", "bacon", "broccoli", "popcorn", "corn", "bread", "money"],
}

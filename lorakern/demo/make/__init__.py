"""How the small base model of the demo was made: artwork, captions, training, scores."""

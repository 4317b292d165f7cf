"""Makes the base model, stage by stage; every stage reads and writes the folder WORK.

    python -m lorakern.demo.make.artwork --work WORK            # fetch and draw, 1 minute
    python -m lorakern.demo.make.train_base vae --work WORK     # tokenizer, autoencoder
    python -m lorakern.demo.make.train_base unet --work WORK    # text encoder and UNet
    python -m lorakern.demo.make.train_base decoder --work WORK
    python -m lorakern.demo.make.train_base export --work WORK --base lorakern/demo/base
    python -m lorakern.demo.make.score --work WORK --base lorakern/demo/base --out WORK/scores

The default steps are those of the shipped model; base/README.md tells its time and its scores. With
`--ranks 2`, two processes (`--rank 0`, `--rank 1`) train the UNet together and meet through the
file WORK/meeting, which must not be left over from an earlier run.
Needs `pip install torch diffusers transformers pillow fonttools resvg-py`, apt-get and npm.
"""

import argparse
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from . import export, tokenizer, unet, vae


def run_vae(options: argparse.Namespace) -> None:
    tokenizer.write(options.work, options.work / "tokenizer")
    vae.train(options.work).save_pretrained(options.work / "vae")


def run_unet(options: argparse.Namespace) -> None:
    unet.train(
        options.work,
        options.steps,
        options.decay_from,
        rank=options.rank,
        ranks=options.ranks,
        resume=options.resume,
    )


def run_decoder(options: argparse.Namespace) -> None:
    model = vae.read(options.work / "vae")
    vae.tune_decoder(model, options.work).save_pretrained(options.work / "vae_tuned")


def run_export(options: argparse.Namespace) -> None:
    folder = options.work / "vae_tuned"
    model = vae.read(folder if folder.exists() else options.work / "vae")
    stored = torch.load(options.work / "unet.pt", weights_only=True)
    words = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    pipe = export.pipeline(model, words, stored["average"])
    size = export.write(pipe, options.work / "tokenizer", options.base)
    print(f"step {stored['step']}: {size / 1e6:.2f} MB of weights in {options.base}")


STAGES = {"vae": run_vae, "unet": run_unet, "decoder": run_decoder, "export": run_export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="the diffusers folder that export writes")
    parser.add_argument("--steps", type=int, default=2350)
    parser.add_argument("--decay-from", type=int, default=800)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from WORK/unet.pt")
    options = parser.parse_args()
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()

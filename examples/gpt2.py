"""A small GPT-2 of transformers on a twentieth of Penn Treebank, whose dropouts and weight decay tune themselves.

    pip install '.[examples]' && python examples/gpt2.py --data-root DIR

The dropout of attention weights is off: transformers' attention reads its rate as a number, the same for all examples.
The plain run has the same epochs at the first guess, one pass per batch, without the validation labels; the two numbers
are not a comparison at equal compute (benchmarks/five_lines.py is one).
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import stn_fast as stn
from stn_fast.data import ptb


def batch_of(windows: list[tuple[Tensor]]) -> dict[str, Tensor]:
    words = torch.stack([window for (window,) in windows])
    return {"input_ids": words, "labels": words}  # the model shifts the labels


@torch.no_grad()
def perplexity(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]]) -> float:
    model.eval()
    losses = [model(**batch).loss.expand(len(batch["labels"])) for batch in batches]  # of 31 words in each window
    return torch.cat(losses).mean().exp().item()


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=4)
    it.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: $STN_FAST_DATA)")
    flags = it.parse_args(arguments)
    torch.manual_seed(0)
    corpus = ptb.load(flags.data_root, train_fraction=0.05)
    parts = (TensorDataset(text[: len(text) // 32 * 32].view(-1, 32)) for text in corpus[:3])
    train, valid, test = (DataLoader(part, 32, shuffle=i < 2, collate_fn=batch_of) for i, part in enumerate(parts))
    shape = dict(vocab_size=len(corpus.words), n_positions=32, n_embd=64, n_layer=2, n_head=2)
    plain = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **shape))
    tuned = stn.convert(copy.deepcopy(plain))
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3, weight_decay=1e-4)  # where the tuned one starts
    for batch, _ in stn.alternate(train, valid, epochs=flags.epochs):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner = stn.SelfTuner(tuned, torch.optim.Adam(tuned.parameters(), 1e-3), loss=lambda output, batch: output.loss)
    for batch, held_out in stn.alternate(train, valid, epochs=flags.epochs):
        tuner.step(batch, held_out)
    print(tuner.values())
    print(f"test perplexity: plain {perplexity(plain, test):.1f}, self-tuned {perplexity(tuner.fold(), test):.1f}")


if __name__ == "__main__":
    main()

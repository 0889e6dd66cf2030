"""A small GPT-2 of transformers on a twentieth of Penn Treebank, whose dropouts and weight decay tune themselves.

    python examples/gpt2.py --data-root DIR

The dropout of attention weights is off: transformers' attention reads its rate as a number, the same for all examples.
`pip install '.[examples]'` installs transformers; nothing is downloaded but the text.
"""

import argparse
import copy
from collections.abc import Iterable

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
def perplexity(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    return torch.stack([model.eval()(**batch).loss for batch in batches]).mean().exp().item()


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=4)
    it.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: $STN_FAST_DATA)")
    flags = it.parse_args(arguments)
    torch.manual_seed(0)
    corpus = ptb.load(flags.data_root, train_fraction=0.05)
    parts = (TensorDataset(text[: len(text) // 32 * 32].view(-1, 32)) for text in corpus[:3])
    train, valid, test = (DataLoader(part, 32, shuffle=True, collate_fn=batch_of) for part in parts)
    shape = dict(vocab_size=len(corpus.words), n_positions=32, n_embd=64, n_layer=2, n_head=2)
    plain = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **shape))
    tuned = stn.convert(copy.deepcopy(plain))
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3)
    for batch, _ in stn.alternate(train, valid, epochs=flags.epochs):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    of_tuned = torch.optim.AdamW(tuned.parameters(), 1e-3, weight_decay=0)
    tuner = stn.SelfTuner(tuned, of_tuned, loss=lambda output, batch: output.loss)
    for batch, held_out in stn.alternate(train, valid, epochs=flags.epochs):
        tuner.step(batch, held_out)
    print(tuner.values())
    print(f"test perplexity: plain {perplexity(plain, test):.1f}, self-tuned {perplexity(tuner.fold(), test):.1f}")


if __name__ == "__main__":
    main()

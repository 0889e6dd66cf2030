"""A small BERT of transformers, as masked language model of a twentieth of Penn Treebank; its dropouts tune themselves.

    pip install '.[examples]' && python examples/bert.py --data-root DIR

In each window, three of 32 words are hidden, drawn anew. The plain run has the same epochs at the first guess, one pass
per batch, without the validation labels; the numbers are no comparison at equal compute (benchmarks/five_lines.py is).
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMaskedLM

import stn_fast as stn
from stn_fast.data import ptb


def hide(windows: list[tuple[Tensor]]) -> dict[str, Tensor]:
    words = torch.stack([window for (window,) in windows]) + 1  # 0 is [MASK]
    hidden = torch.rand(words.shape).argsort(1) < 3  # as many in each window
    return {"input_ids": words.masked_fill(hidden, 0), "labels": words.masked_fill(~hidden, -100)}


@torch.no_grad()
def perplexity(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]]) -> float:
    torch.manual_seed(0)  # hides the same words for each model
    return torch.cat([model(**some).loss.expand(len(some["labels"])) for some in batches]).mean().exp().item()


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=4)
    it.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: $STN_FAST_DATA)")
    flags = it.parse_args(arguments)
    torch.manual_seed(0)
    corpus = ptb.load(flags.data_root, train_fraction=0.05)
    parts = (TensorDataset(text[: len(text) // 32 * 32].view(-1, 32)) for text in corpus[:3])
    train, valid, test = (DataLoader(part, 32, shuffle=i < 2, collate_fn=hide) for i, part in enumerate(parts))
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    words = dict(vocab_size=len(corpus.words) + 1, max_position_embeddings=32, pad_token_id=None)
    plain = BertForMaskedLM(BertConfig(attention_probs_dropout_prob=0.0, **sizes, **words))
    tuned = stn.convert(copy.deepcopy(plain))
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3, weight_decay=1e-4)  # where the tuned one starts
    for batch, _ in stn.alternate(train, valid, epochs=flags.epochs):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuner = stn.SelfTuner(tuned, torch.optim.Adam(tuned.parameters(), 1e-3), loss=lambda output, batch: output.loss)
    for batch, held_out in stn.alternate(train, valid, epochs=flags.epochs):
        tuner.step(batch, held_out)
    before, after = (perplexity(model.eval(), test) for model in (plain, tuner.fold()))
    print(f"{tuner.values()}\ntest perplexity: plain {before:.1f}, self-tuned {after:.1f}")


if __name__ == "__main__":
    main()

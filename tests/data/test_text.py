"""Corpora: which word has which number, what is cached and when it is believed, and one clear line for a bad text."""

import hashlib
import io
import os
import zipfile

import pytest
import torch

from stn_fast.data import ptb, text, wikitext2
from stn_fast.data.download import Published
from stn_fast.errors import UserError

TRAIN = "the cat saw the dog\n\nthe dog ran\n"
VALID = "the dog saw the cat\n"
TEST = "the cat ran"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


@pytest.fixture
def files(tmp_path):
    """files(train=..., valid=..., test=...): three paths; contents as text or bytes."""

    def files(**contents):
        paths = []
        for name, default in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
            given = contents.get(name, default)
            paths.append(tmp_path / f"{name}.txt")
            paths[-1].write_bytes(given if isinstance(given, bytes) else given.encode())
        return paths

    return files


@pytest.fixture
def building(monkeypatch):
    """The names of the texts of every corpus that is built rather than restored."""
    built = []
    build = text._built
    monkeypatch.setattr(text, "_built", lambda *arguments: built.append(arguments[1]) or build(*arguments))
    return built


def said(corpus, part):
    return " ".join(corpus.words[number] for number in getattr(corpus, part).tolist())


def same(one, other):
    return one.words == other.words and all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        text.load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_line_ends_in_eos_blank_and_unfinished_ones_too(files):
    corpus = text.load(*files())
    assert said(corpus, "train") == "the cat saw the dog <eos> <eos> the dog ran <eos>"
    assert said(corpus, "test") == "the cat ran <eos>"
    assert corpus.train.dtype == torch.int64


def test_numbers_go_by_count_then_by_first_appearance(files):
    assert text.load(*files()).words == ("the", "<eos>", "dog", "cat", "saw", "ran")


def test_line_ends_of_windows_and_a_byte_order_mark_are_no_words(files):
    windows = {"train": b"\xef\xbb\xbf" + TRAIN.replace("\n", "\r\n").encode()}
    assert same(text.load(*files(**windows)), text.load(*files()))


def test_a_line_ends_at_a_line_feed_alone(files):
    corpus = text.load(*files(train="a\x0bb\x85c\u2028d\n"), min_count=2)
    assert len(corpus.train) == 5


def test_words_rarer_than_the_minimum_count_are_unknown(files):
    corpus = text.load(*files(), min_count=2)
    assert set(corpus.words) == {"the", "<eos>", "dog", "<unk>"}
    assert said(corpus, "train") == "the <unk> <unk> the dog <eos> <eos> the dog <unk> <eos>"
    assert said(corpus, "valid") == "the dog <unk> the <unk> <eos>"
    test = said(corpus, "test").split()
    assert corpus.unknown_share() == test.count("<unk>") / len(test)


def test_the_unknown_word_of_the_training_text_takes_the_new_ones(files):
    corpus = text.load(*files(train=TRAIN + "<unk>\n", test="the bird\n"))
    assert said(corpus, "test") == "the <unk> <eos>"


def test_a_share_of_the_training_text_is_its_start_and_makes_the_vocabulary(files):
    whole = text.load(*files(train=TRAIN * 50), min_count=2)
    part = text.load(*files(train="x x " + TRAIN * 50), min_count=2, train_fraction=0.01)
    assert said(part, "train") == "x x the <unk> <unk> the"
    assert "dog" in whole.words
    assert "dog" not in part.words
    assert len(part.valid) == len(whole.valid)


def test_a_fraction_without_a_line_end_still_has_eos(files):
    corpus = text.load(*files(test="the cat\n"), train_fraction=0.45)
    assert said(corpus, "train") == "the cat saw the dog"
    assert said(corpus, "valid") == "the dog saw the cat <eos>"


def test_every_word_is_a_target_once_and_its_input_the_word_before(files):
    corpus = text.load(*files())
    inputs, targets = corpus.data_set().test
    assert torch.equal(targets, corpus.test)
    assert [corpus.words[number] for number in inputs.tolist()] == ["<eos>", "the", "cat", "ran"]


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({"valid": ""}, "valid.txt is empty; it needs at least one word"),
        ({"train": " \n\n"}, "train.txt is empty"),
        ({"test": b"fine\nna\xefve\n"}, "test.txt is not UTF-8: byte 0xef at offset 7 cannot be decoded"),
        ({"train": b"\xef\xbb\xbfab\xff"}, "train.txt is not UTF-8: byte 0xff at offset 5"),
        ({"valid": "the <eos> cat\nthe bird\n"}, "valid.txt, line 2: the word 'bird' is not in the training text"),
        ({"test": "the cat\nthe bird\n"}, "test.txt, line 2: the word 'bird' is not in the training text"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line_that_names_it(files, cache, contents, says):
    assert says in refused(*files(**contents))
    assert not cache.exists()


def test_a_file_that_is_not_there_and_arguments_out_of_range_are_named(files, tmp_path):
    train, valid, test = files()
    assert "cannot read the text" in refused(train, tmp_path / "absent", test)
    assert "min_count = 0" in refused(train, valid, test, min_count=0)
    for share in (0, 1.5, float("nan")):
        assert f"train_fraction (--train-fraction) = {share}" in refused(train, valid, test, train_fraction=share)


def test_a_second_load_reads_the_cache_and_gives_the_same(files, building):
    first, second = text.load(*files()), text.load(*files())
    assert same(first, second)
    assert len(building) == 1


def test_another_text_or_option_is_cached_separately(files, building):
    text.load(*files())
    swapped = {"valid": TEST, "test": VALID}
    others = (({}, {"valid": TEST}), ({}, swapped), ({"min_count": 2}, {}), ({"train_fraction": 0.9}, {}))
    for options, contents in others:
        assert same(text.load(*files(**contents), **options), text.load(*files(**contents), **options, cache=False))
    assert len(building) == 1 + 4 * 2


def test_a_cache_of_another_format_is_not_read(files, building, monkeypatch):
    text.load(*files())
    monkeypatch.setattr(text, "FORMAT", text.FORMAT + 1)
    text.load(*files())
    assert len(building) == 2


def test_one_text_under_other_names_is_one_corpus(files, building, tmp_path):
    text.load(*files())
    moved = [path.rename(tmp_path / f"moved-{path.name}") for path in files()]
    text.load(*moved)
    assert len(building) == 1


@pytest.mark.parametrize(
    "damage",
    [lambda contents: b"", lambda contents: contents[:-1], lambda contents: contents[:90] + b"\xff" + contents[91:]],
    ids=["empty", "truncated", "a byte changed"],
)
def test_a_damaged_cache_is_built_again_and_mended(files, cache, building, damage):
    first = text.load(*files())
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(text.load(*files()), first)
    assert file.read_bytes() == whole
    assert len(building) == 2


def test_where_the_cache_cannot_be_written_the_corpus_is_the_same(files, cache, building):
    cache.parent.write_text("a file where the folder should be")
    assert same(text.load(*files()), text.load(*files()))
    assert len(building) == 2


def test_a_kill_while_the_cache_is_written_leaves_nothing_of_that_name(files, cache, monkeypatch):
    def stop(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        text.load(*files())
    assert list(cache.iterdir()) == []


def test_without_a_place_for_a_cache_the_corpus_is_the_same(files, monkeypatch):
    def homeless():
        raise UserError("there is no home directory")

    monkeypatch.setattr(text, "cache_root", homeless)
    assert same(text.load(*files()), text.load(*files(), cache=False))


def test_without_a_cache_nothing_is_written(files, cache):
    text.load(*files(), cache=False)
    assert not cache.exists()


def test_the_standard_treebank_is_the_published_one(standard):
    root = standard("ptb")
    corpus = ptb.load(root)
    assert [len(part) for part in corpus] == [929589, 73760, 82430, 10000]
    assert [int((part == corpus.words.index("<eos>")).sum()) for part in corpus[:3]] == [42068, 3370, 3761]
    assert said(corpus, "valid").startswith("consumers may want to move their")
    assert same(corpus, ptb.load(root))


def test_a_twentieth_of_the_treebank_has_the_words_seen_twice(standard):
    corpus = ptb.load(standard("ptb"), train_fraction=0.05, min_count=2)
    assert (len(corpus.train), len(corpus.words)) == (46480, 3141)
    assert [len(part) for part in corpus[1:3]] == [73760, 82430]


def test_a_changed_treebank_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / ptb.FOLDER
    folder.mkdir()
    for file in ptb.FILES:
        (folder / file.name).write_bytes(b"the cat \n" * (file.size // 9) + b"x" * (file.size % 9))
    with pytest.raises(UserError, match=r"ptb\.train\.txt is not the published file \(its SHA-256 differs\)"):
        ptb.load(tmp_path)


def test_a_treebank_is_read_with_the_options_given(tmp_path, cache, monkeypatch):
    folder, published = tmp_path / ptb.FOLDER, []
    folder.mkdir()
    for file, part in zip(ptb.FILES, (TRAIN, VALID, TEST), strict=True):
        (folder / file.name).write_text(part)
        published.append(Published(file.name, len(part), hashlib.sha256(part.encode()).hexdigest(), ()))
    monkeypatch.setattr(ptb, "FILES", published)
    corpus = ptb.load(tmp_path, min_count=2, train_fraction=0.5, cache=False)
    assert said(corpus, "train") == "the <unk> <unk> the <unk> <eos>"
    assert not cache.exists()


def wikitext_archive(server, monkeypatch, parts=(TRAIN, VALID, TEST)):
    """Publishes ``parts`` as the archive of WikiText-2, with what else an archive may hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("wikitext-2/../../outside", "no")
        for name, part in zip(wikitext2.FILES, parts, strict=True):
            archive.writestr(f"wikitext-2/{name}", part)
    contents = server.files["wikitext-2-v1.zip"] = buffer.getvalue()
    address = server.address + "wikitext-2-v1.zip"
    published = Published("wikitext-2-v1.zip", len(contents), hashlib.sha256(contents).hexdigest(), (address,))
    monkeypatch.setattr(wikitext2, "ARCHIVE", published)
    monkeypatch.setattr(wikitext2, "WORDS", (11, 6, 4))


def test_wikitext_is_fetched_unpacked_and_read(tmp_path, server, monkeypatch):
    wikitext_archive(server, monkeypatch)
    corpus = wikitext2.load(tmp_path / "data")
    assert said(corpus, "test") == "the cat ran <eos>"
    assert same(corpus, wikitext2.load(tmp_path / "data"))
    assert server.asked == ["wikitext-2-v1.zip"]
    assert sorted(os.listdir(tmp_path / "data" / "wikitext-2")) == sorted(wikitext2.FILES)
    assert not (tmp_path / "outside").exists()


def test_a_wikitext_is_read_with_the_options_given(tmp_path, cache, server, monkeypatch):
    wikitext_archive(server, monkeypatch)
    corpus = wikitext2.load(tmp_path, min_count=2, train_fraction=0.5, cache=False)
    assert said(corpus, "train") == "the <unk> <unk> the <unk> <eos>"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ((TRAIN + "the\n", VALID, TEST), r"wiki\.train\.tokens is not .* \(13 words used, 11 expected\)"),
        ((TRAIN, VALID, TEST + "\nthe\n"), r"wiki\.test\.tokens is not .* \(6 words used, 4 expected\)"),
    ],
)
def test_a_wikitext_of_another_length_is_refused_by_name(tmp_path, server, monkeypatch, parts, says):
    wikitext_archive(server, monkeypatch, parts)
    with pytest.raises(UserError, match=says):
        wikitext2.load(tmp_path)

import json
import random
import shutil
import unicodedata

import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rwkv_es.engine.stops import Stops, cut, make_stops
from rwkv_es.pretrained.checkpoint import resolve
from rwkv_es.pretrained.tokenizer import JsonTokenizer, WorldTokenizer, json_beside, load_tokenizer
from rwkv_es.system.errors import ConfigError

TEXT = "Hello, world!\n\nUser: 12 + 30 = 42 €\n日本語の文章です。 Ёжик 🦆🦆\t<think>…</think>"


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE as Pile models have one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT, "the answer is the answer"] * 5, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return JsonTokenizer(path)


def changed(path, byte_level, **parts):
    """Write the byte-level tokenizer with other parts, as they stand in its JSON."""
    content = {**json.loads(byte_level._tokenizer.to_str()), **parts}
    path.write_text(json.dumps(content))
    return JsonTokenizer(path)


def added(i, content):
    """Return an added token as a JSON spells it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": i == 0}


def test_world_has_the_ids_of_the_published_vocabulary(world):
    assert world.encode("\n\n") == [261]
    assert world.encode("\n\nUser:") == [261, 24281, 59]
    assert world.n_vocab == len(world.token_bytes) == 65530
    assert world.token_bytes[0] == b"" and all(world.token_bytes[1:65530])


def test_world_equals_the_rwkv_package(world):
    from pathlib import Path

    import rwkv.rwkv_tokenizer as package

    vocabulary = Path(package.__file__).with_name("rwkv_vocab_v20230424.txt")
    reference = TRIE_TOKENIZER(str(vocabulary))
    assert world.token_bytes[1:] == [reference.idx2token[i] for i in range(1, 65530)]
    draw = random.Random(0)
    mixed = "".join(draw.choices(TEXT + " aetnosi<>/\n", k=5000))
    letters = b"".join(draw.choices(world.token_bytes[1:], k=5000)).decode("utf-8", "ignore")
    for text in (TEXT, "", "a", mixed, letters):
        assert world.encode(text) == reference.encode(text)
    assert world.decode(world.encode(TEXT)) == TEXT


@pytest.mark.parametrize("name", ["world", "byte_level"])
def test_text_ends_at_token_0_and_at_a_half_character(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([*ids, 0, *ids]) == TEXT
    for length in range(len(ids)):
        whole = b"".join(tokenizer.token_bytes[i] for i in ids[:length])
        assert tokenizer.decode(ids[:length]) == whole.decode("utf-8", "replace")
        assert tokenizer.decode(ids[:length]).rstrip("\ufffd") in TEXT


@pytest.mark.parametrize("name", ["world", "byte_level"])
def test_bytes_of_the_tokens_spell_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()
    assert tokenizer.token_bytes[0] == b""


@pytest.mark.parametrize("name", ["world", "byte_level"])
def test_a_lone_surrogate_is_read_as_one_replacement_character_and_a_pair_as_what_it_spells(name, request):
    tokenizer = request.getfixturevalue(name)
    for text, read in (("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("\ud83e\udd86", "🦆"), ("\ufeffa", "\ufeffa")):
        assert tokenizer.encode(text) == tokenizer.encode(read)
        assert tokenizer.decode(tokenizer.encode(text)) == read


def test_the_embedded_tokenizer_is_found_beside_its_model_and_refuses_what_it_cannot_express():
    path = resolve("tiny")
    tokenizer = load_tokenizer("auto", path, 115)
    assert tokenizer.decode(tokenizer.encode("3 7 10=24:")) == "3 7 10=24:"
    with pytest.raises(ConfigError, match="cannot express 'Hello"):
        tokenizer.encode("Hello there")


def test_a_prompt_cannot_end_the_document(byte_level):
    ids = byte_level.encode("a<|endoftext|>b")
    assert 0 not in ids and byte_level.decode(ids) == "a<|endoftext|>b"


LOSSY = {
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "compatibility characters": {"normalizer": {"type": "NFKC"}},
    "stripped": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "a prefix space": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
}


@pytest.mark.parametrize("case", LOSSY)
def test_a_byte_level_tokenizer_that_changes_a_prompt_is_refused(tmp_path, byte_level, case):
    lossy = changed(tmp_path / "lossy.json", byte_level, **LOSSY[case])
    with pytest.raises(ConfigError, match=r"lossy\.json turns .* into .*; take a tokenizer that keeps every") as caught:
        lossy.encode("The answer ② is ")
    assert "\n" not in str(caught.value)


def test_a_byte_that_the_vocabulary_lacks_is_not_dropped(tmp_path, byte_level):
    model = json.loads(byte_level._tokenizer.to_str())["model"]
    for byte in "\u0101\u0102":
        model["vocab"][f"<{byte}>"] = model["vocab"].pop(byte)
    model["merges"] = []
    lacks = changed(tmp_path / "lacks.json", byte_level, model=model)
    assert lacks.decode(lacks.encode("an answer")) == "an answer"
    with pytest.raises(ConfigError, match=r"turns 'a\\x01b' into 'ab'"):
        lacks.encode("a\x01b")


def test_composed_characters_are_the_same_text(tmp_path, byte_level):
    """Pile models come with the normalizer NFC, which they were trained with."""
    pile = changed(tmp_path / "pile.json", byte_level, normalizer={"type": "NFC"})
    text = unicodedata.normalize("NFD", "un café à Zürich")
    assert pile.encode(text) == byte_level.encode(unicodedata.normalize("NFC", text)) != byte_level.encode(text)


def test_truncation_padding_and_dropout_of_the_json_have_no_effect(tmp_path, byte_level):
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding.update({"pad_id": 1, "pad_type_id": 0, "pad_token": "!"})
    model = {**json.loads(byte_level._tokenizer.to_str())["model"], "dropout": 0.5}
    like = changed(tmp_path / "like.json", byte_level, truncation=truncation, padding=padding, model=model)
    assert all(like.encode(TEXT) == byte_level.encode(TEXT) for _ in range(5))


def test_added_tokens_are_plain_text(tmp_path, byte_level):
    """In the byte-level spelling é is the byte E9, and Ġ a space."""
    n = byte_level.n_vocab
    tokens = [added(0, "<|endoftext|>"), added(n, "café"), added(n + 1, "  "), added(n + 2, "Ġ<x>")]
    with_added = changed(tmp_path / "added.json", byte_level, added_tokens=tokens)
    assert with_added.token_bytes[n:] == ["café".encode(), b"  ", "Ġ<x>".encode()]
    text = "un café  ou Ġ<x> ?"
    assert {n, n + 1, n + 2} < set(with_added.encode(text)) and with_added.decode(with_added.encode(text)) == text


def test_a_vocabulary_of_more_than_65536_ids(tmp_path):
    path = tmp_path / "large.json"
    large = Tokenizer(models.WordLevel({"<end>": 0, **{f"w{i}": i for i in range(1, 70000)}}, unk_token="<end>"))
    large.add_special_tokens(["<end>"])
    large.save(str(path))
    tokenizer = load_tokenizer(str(path), tmp_path / "model.pth", 70000)
    assert tokenizer.n_vocab == len(tokenizer.token_bytes) == 70000
    assert tokenizer.encode("w69999") == [69999] and tokenizer.decode([69999, 0, 5]) == "w69999"
    can_end = make_stops(tokenizer, ["9999"]).can_end.nonzero()[0].tolist()
    assert can_end == [9999, 19999, 29999, 39999, 49999, 59999, 69999]
    with pytest.raises(ConfigError, match="has 70000 ids, but the model only 65536"):
        load_tokenizer(str(path), tmp_path / "model.pth", 65536)
    with pytest.raises(ConfigError, match="no tokenizer for a vocabulary of 70000"):
        load_tokenizer("auto", tmp_path / "model.pth", 70000)


def test_ids_with_gaps_count_up_to_the_highest(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 5}, unk_token="<end>"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "gaps.json"))
    gaps = JsonTokenizer(tmp_path / "gaps.json")
    assert gaps.n_vocab == len(gaps.token_bytes) == 6 and gaps.encode("a") == [5]


def words(path, size):
    """Write a tokenizer of so many ids."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    tokenizer.add_special_tokens(["<0>"])
    tokenizer.save(str(path))


def test_what_is_chosen_without_being_named(tmp_path, byte_level):
    assert isinstance(load_tokenizer("auto", tmp_path / "model.pth", 65536), WorldTokenizer)
    byte_level._tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer("auto", tmp_path / "model.pth", byte_level.n_vocab), JsonTokenizer)
    assert load_tokenizer("world", tmp_path / "model.pth", 65536).n_vocab == 65530


def test_of_two_tokenizers_in_a_folder_the_models_own_is_taken(tmp_path, byte_level):
    byte_level._tokenizer.save(str(tmp_path / "tokenizer.json"))
    own = resolve("tiny").with_name("rwkv7-tiny.tokenizer.json").read_text()
    (tmp_path / "rwkv7-g1-0.1b-ctx4096.tokenizer.json").write_text(own)
    assert load_tokenizer("auto", tmp_path / "rwkv7-g1-0.1b-ctx4096.pth", 65536).n_vocab == 115
    assert load_tokenizer("auto", tmp_path / "another.pth", byte_level.n_vocab).n_vocab == byte_level.n_vocab


@pytest.mark.parametrize(("size", "n_vocab"), [(65529, 65536), (65530, 65530), (50277, 50304), (50277, 50277)])
def test_a_tokenizer_without_a_models_name_serves_heads_of_its_size_padded_or_not(tmp_path, capsys, size, n_vocab):
    words(tmp_path / "tokenizer.json", size)
    assert load_tokenizer("auto", tmp_path / "model.pth", n_vocab).n_vocab == size
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [300, 32000, 50277, 70000])
def test_a_tokenizer_of_another_model_in_the_folder_is_not_taken_for_the_models(tmp_path, capsys, size):
    words(tmp_path / "tokenizer.json", size)
    assert isinstance(load_tokenizer("auto", tmp_path / "model.pth", 65536), WorldTokenizer)
    note = capsys.readouterr().err
    assert str(tmp_path / "tokenizer.json") in note and str(size) in note and "World" in note
    with pytest.raises(ConfigError, match=f"has {size} ids, but the model 1024"):
        load_tokenizer("auto", tmp_path / "model.pth", 1024)


def test_what_an_export_takes_along_is_the_models_own_tokenizer(tmp_path):
    model = tmp_path / "model.pth"
    shutil.copyfile(resolve("tiny"), model)
    words(tmp_path / "tokenizer.json", 300)
    assert json_beside(model) is None, "300 ids for a head of 115"
    words(tmp_path / "tokenizer.json", 115)
    assert json_beside(model) == tmp_path / "tokenizer.json"
    words(tmp_path / "model.tokenizer.json", 100)
    assert json_beside(model) == tmp_path / "model.tokenizer.json"


def test_a_smaller_tokenizer_that_was_named_is_taken_with_a_note(tmp_path, capsys):
    words(tmp_path / "small.json", 300)
    assert load_tokenizer(str(tmp_path / "small.json"), tmp_path / "model.pth", 65536).n_vocab == 300
    assert "300 ids, the model 65536" in capsys.readouterr().err


def test_tokenizers_that_do_not_fit_are_refused(tmp_path, byte_level):
    with pytest.raises(ConfigError, match="no tokenizer for a vocabulary of 512"):
        load_tokenizer("auto", tmp_path / "model.pth", 512)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none.json"), tmp_path / "model.pth", 512)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "broken.json"), tmp_path / "model.pth", 512)
    byte_level._tokenizer.save(str(tmp_path / "large.json"))
    with pytest.raises(ConfigError, match=f"has {byte_level.n_vocab} ids, but the model only 100"):
        load_tokenizer(str(tmp_path / "large.json"), tmp_path / "model.pth", 100)
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain.save(str(tmp_path / "no_end.json"))
    with pytest.raises(ConfigError, match="id 0 must be a special token"):
        load_tokenizer(str(tmp_path / "no_end.json"), tmp_path / "model.pth", 100)


def test_stop_strings_are_found_wherever_tokens_split_them():
    """Against a plain search in the bytes, on random vocabularies over a small alphabet."""
    draw = random.Random(0)
    hits = 0
    for _ in range(300):
        tokens = [b""] + [bytes(draw.choices(b"abc", k=draw.randint(1, 4))) for _ in range(12)]
        strings = ["".join(draw.choices("abc", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 3))]
        stops = make_stops(FakeTokenizer(tokens), strings)
        ids = []
        while len(ids) < 30:
            ids.append(draw.randrange(1, 13))
            text = b"".join(tokens[i] for i in ids)
            is_in = any(string.encode() in text for string in strings)
            assert (bool(stops.can_end[ids[-1]]) and stops.hit(ids)) == is_in
            if is_in:
                hits += 1
                shortened = cut(text.decode(), strings)
                assert not any(string in shortened for string in strings) and text.decode().startswith(shortened)
                break
    assert hits > 250


class FakeTokenizer:
    end_id = 0

    def __init__(self, tokens):
        self.token_bytes = tokens


def test_no_stop_strings_never_stop():
    stops = make_stops(FakeTokenizer([b"", b"a"]), [""])
    assert isinstance(stops, Stops) and not stops.can_end.any()
    assert cut("abc", ()) == "abc" and cut("ab\n\nUser: c", ("\n\nUser:",)) == "ab"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a</b>c", "a</b>"),
        ("a</b>c</b>", "a</b>"),
        ("aSTOP</b>", "a"),
        ("a</b>STOP", "a</b>"),
        ("abc", "abc"),
    ],
)
def test_an_end_string_is_kept_and_a_stop_string_is_not(text, kept):
    assert cut(text, ["STOP"], ["</b>"]) == kept

"""An export is loaded by `transformers` itself, and is never half there."""

import json
import math
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from stacking_ds.checkpoint import hugging_face, manifest
from stacking_ds.checkpoint.folders import choose
from stacking_ds.checkpoint.hugging_face import export_to_hugging_face
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.sources.documents import split_sentences
from stacking_ds.distributed.world import World
from stacking_ds.errors import CheckpointError, ConfigError, DataError
from stacking_ds.model.bert import BertForPreTraining, from_rows, parameter_shapes
from stacking_ds.model.bert_config import BertConfig
from stacking_ds.sharding.fragments import MASTER, Cut, Fragment
from stacking_ds.train.from_checkpoint import export_run
from stacking_ds.train.plan import TrainingPlan, open_plan
from tests.checkpoints import save_now
from tests.prose import documents, prepare, tiny_shards
from tests.ranks import run_ranks
from tests.runs import small_recipe
from tests.token_shards import sentence_lengths_of

# [PAD] is not token 0, so that a default would be noticed
VOCABULARY = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "stack", "##ing", "cafe", "the", "!"]
CONFIG = BertConfig(
    vocab_size=16,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
    layer_norm_eps=1e-7,
    initializer_range=0.3,
)


def _tokenizer(folder: Path, *, lowercase: bool = True) -> Tokenizer:
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=lowercase, handle_chinese_chars=True, clean_text=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(VOCABULARY[:5])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY))
    return tokenizer


def _tensors(config: BertConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        name: value.detach() for name, value in BertForPreTraining(config, seed).named_parameters()
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    _tokenizer(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def exported(tmp_path: Path, data: Path) -> Path:
    export_to_hugging_face(_tensors().items(), CONFIG, data, tmp_path / "run" / "export")
    return tmp_path / "run" / "export"


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=generator)
    return ids_BS, torch.arange(9).ge(4).long().expand(2, 9), torch.ones(2, 9, dtype=torch.bool)


def test_the_pretraining_model_gives_the_same_logits(exported: Path) -> None:
    theirs, info = transformers.BertForPreTraining.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(info.values()), info
    ours = BertForPreTraining(CONFIG, seed=0).eval()
    ids_BS, types_BS, mask_BS = _inputs()
    got = theirs.eval()(ids_BS, token_type_ids=types_BS, attention_mask=mask_BS.long())
    logits_TV, nsp_B2 = ours(*from_rows(ids_BS, types_BS, mask_BS))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.prediction_logits[mask_BS], logits_TV, **close)
    torch.testing.assert_close(got.seq_relationship_logits, nsp_B2, **close)
    assert theirs.dtype == torch.float32
    words = theirs.bert.embeddings.word_embeddings.weight
    assert theirs.cls.predictions.decoder.weight is words


def test_auto_classes_find_all_their_weights(exported: Path) -> None:
    ids_BS, types_BS, mask_BS = _inputs()
    ours = BertForPreTraining(CONFIG, seed=0).eval()
    rows = from_rows(ids_BS, types_BS, mask_BS)
    logits_TV, _ = ours(*rows)
    hidden_TH, _ = ours.bert(*rows)
    inputs = {
        "input_ids": ids_BS,
        "token_type_ids": types_BS,
        "attention_mask": mask_BS.long(),
    }
    masked, info = transformers.AutoModelForMaskedLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not info["missing_keys"]
    theirs_TV = masked.eval()(**inputs).logits[mask_BS]
    torch.testing.assert_close(theirs_TV, logits_TV, rtol=1e-5, atol=1e-5)
    encoder, info = transformers.AutoModel.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(
        encoder.eval()(**inputs).last_hidden_state[mask_BS], hidden_TH, rtol=1e-5, atol=1e-5
    )


def test_the_config_is_the_models(exported: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(exported)
    for name in vars(CONFIG):
        if name != "layer_norm_position":
            assert getattr(config, name) == getattr(CONFIG, name), name
    assert config.pad_token_id == 1
    assert config.architectures == ["BertForPreTraining"]


def test_tied_tensors_are_stored_once(exported: Path) -> None:
    stored = safetensors.torch.load_file(exported / "model.safetensors")
    assert stored.keys() == _tensors().keys()
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_written_as_they_come_and_none_is_kept(tmp_path: Path, data: Path) -> None:
    tensors = _tensors()
    alive: list[int] = []
    given: list[weakref.ref[torch.Tensor]] = []

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for name in reversed(tensors):  # any order will do
            # a copy, and for matrices one that is not contiguous
            copy = tensors[name].t().clone().t()
            given.append(weakref.ref(copy))
            alive.append(sum(reference() is not None for reference in given))
            yield name, copy

    export_to_hugging_face(one_by_one(), CONFIG, data, tmp_path / "export")
    assert max(alive) <= 2  # the one made now, and the name that still holds the one before
    stored = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], value) for name, value in tensors.items())
    content = (tmp_path / "export" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert len(content) == 8 + length + 4 * sum(value.numel() for value in tensors.values())


TEXTS = ["The stacking!", "Stacking, CAFÉ the", "unheard of", "[MASK] the stack", "the中stack"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, lowercase: bool) -> None:
    tokenizer = _tokenizer(tmp_path / "data", lowercase=lowercase)
    export_to_hugging_face(_tensors().items(), CONFIG, tmp_path / "data", tmp_path / "export")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (5 in tokenizer.encode("STACK").ids) == lowercase
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids, text
    pair = loaded("the stack", "stacking!")
    assert pair["input_ids"] == tokenizer.encode("the stack", "stacking!").ids
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (loaded.pad_token_id, loaded.mask_token_id, loaded.model_max_length) == (1, 4, 32)


def test_text_is_cut_to_the_length_that_was_trained(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "export"
    export_to_hugging_face(_tensors().items(), CONFIG, data, out, longest_tokens=8)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.model_max_length == 8
    assert len(loaded("the stack " * 20, truncation=True)["input_ids"]) == 8
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.max_position_embeddings == 32, "the weights have so many"


@pytest.mark.parametrize(
    "options", [{}, {"cased": True}, {"keep_accents": True}], ids=["uncased", "cased", "accents"]
)
def test_the_export_tokenizes_as_the_data_was_prepared(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    said = "Café Éclair is OPEN. The 漢字 of Zoë, don't you know? Été ﬁne İstanbul.\n"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{said}{words}\n" for words in documents(12)), "utf-8")
    prepare(str(text), tmp_path / "data", vocab_size=300, heldout_fraction=0.3, **options)
    data = TokenShards.open(tmp_path / "data")
    config = CONFIG.changed(vocab_size=data.manifest.vocab_size)
    export_to_hugging_face(_tensors(config).items(), config, tmp_path / "data", tmp_path / "export")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded.do_lower_case == ("cased" not in options)
    expected = []
    for words in documents(12):
        sentences = split_sentences(f"{said}{words}")
        expected.append(loaded(sentences, add_special_tokens=False)["input_ids"])
    found = [
        [ids.tolist() for ids in np.split(split.tokens_of(k), ends[:-1])]
        for split in map(data.split, ("train", "heldout"))
        for k in range(split.num_documents)
        for ends in [sentence_lengths_of(split, k).cumsum()]
    ]
    assert sorted(found) == sorted(expected)
    # the exported folder, and the prepared one, are vocabularies to prepare with
    for folder in ("export", "data"):
        again = prepare(
            str(text), tmp_path / f"by-{folder}", vocabulary=tmp_path / folder, heldout_fraction=0.3
        )
        assert again.manifest is not None
        assert again.manifest.request.normalization == data.manifest.request.normalization
        assert again.manifest.train == data.manifest.train


def test_pre_layer_norm_is_refused(tmp_path: Path, data: Path) -> None:
    config = CONFIG.changed(layer_norm_position="pre")
    with pytest.raises(ConfigError, match="layer_norm_position='pre' cannot be exported"):
        export_to_hugging_face(_tensors(config).items(), config, data, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_tensors_of_another_model_are_refused(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "export"
    with pytest.raises(CheckpointError, match=r"of 2 layers: missing \[\], unknown .*layer\.2\."):
        export_to_hugging_face(_tensors().items(), CONFIG.changed(num_hidden_layers=2), data, out)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight has shape \(16, 24\) where"):
        export_to_hugging_face(_tensors().items(), CONFIG.changed(vocab_size=17), data, out)
    assert not out.exists()


def test_every_tensor_must_come_exactly_once(exported: Path, data: Path) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    pairs = list(_tensors(seed=1).items())
    first, last = pairs[0][0], pairs[-1][0]
    with pytest.raises(CheckpointError, match=rf"missing \['{last}'\], unknown or twice \[\]"):
        export_to_hugging_face(pairs[:-1], CONFIG, data, exported)
    with pytest.raises(CheckpointError, match=rf"missing \[\], unknown or twice \['{first}'\]"):
        export_to_hugging_face([*pairs, pairs[0]], CONFIG, data, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_a_wrong_tokenizer_is_refused(tmp_path: Path, data: Path) -> None:
    small = CONFIG.changed(vocab_size=9)
    with pytest.raises(DataError, match="has 10 tokens, the model 9"):
        export_to_hugging_face(_tensors(small).items(), small, data, tmp_path / "export")
    (data / "vocab.txt").unlink()
    with pytest.raises(DataError, match=r"vocab\.txt is missing"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, tmp_path / "export")
    (data / "vocab.txt").touch()
    broken = json.loads((data / "tokenizer.json").read_text())
    del broken["model"]["vocab"]["[MASK]"]
    (data / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"not a BERT tokenizer .*\[MASK\]"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, tmp_path / "export")
    (data / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a BERT tokenizer"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, tmp_path / "export")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vocab", "[PAD]", "1"),
        ("vocab", "[PAD]", True),
        ("vocab", "[PAD]", 0),  # that of [UNK]
        ("normalizer", "lowercase", "no"),
        ("normalizer", "strip_accents", [1]),
        ("normalizer", "handle_chinese_chars", 2),
    ],
)
def test_a_tokenizer_that_cannot_be_true_is_damage(
    tmp_path: Path, data: Path, part: str, key: str, value: Any
) -> None:
    content = json.loads((data / "tokenizer.json").read_text())
    (content["model"]["vocab"] if part == "vocab" else content["normalizer"])[key] = value
    (data / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer.json is damaged: its special tokens"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, tmp_path / "export")
    del content["normalizer"]["lowercase"]
    (data / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is not a BERT tokenizer"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, tmp_path / "export")


def test_an_earlier_export_is_replaced_whole(exported: Path, data: Path) -> None:
    export_to_hugging_face(_tensors(seed=1).items(), CONFIG, data, exported)
    stored = safetensors.torch.load_file(exported / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in _tensors(seed=1).items())
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_a_folder_with_somebody_elses_files_is_not_replaced(exported: Path, data: Path) -> None:
    (exported / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        export_to_hugging_face(_tensors(seed=1).items(), CONFIG, data, exported)
    assert (exported / "notes.txt").read_text() == "precious"


def test_a_failing_export_leaves_the_earlier_one_and_nothing_else(
    exported: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face.shutil, "copyfile", full_disk)
    with pytest.raises(
        ConfigError, match=r"cannot write the export.*No space left.*another folder"
    ):
        export_to_hugging_face(_tensors(seed=1).items(), CONFIG, data, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_an_unreadable_source_leaves_the_earlier_export(exported: Path, data: Path) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def damaged() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(_tensors(seed=1).items())[:3]
        raise CheckpointError("rank_00000 is damaged")

    with pytest.raises(CheckpointError, match="rank_00000 is damaged"):
        export_to_hugging_face(damaged(), CONFIG, data, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_what_a_killed_export_left_is_cleared(exported: Path, data: Path) -> None:
    # killed between the two renames: the old export waits beside the place
    exported.rename(exported.with_name(".export.previous"))
    (exported.parent / ".export.partial").mkdir()
    export_to_hugging_face(_tensors().items(), CONFIG, data, exported)
    assert [path.name for path in exported.parent.iterdir()] == ["export"]


def test_a_folder_of_other_things_is_not_overwritten(tmp_path: Path, data: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    export_to_hugging_face(_tensors().items(), CONFIG, data, mine)  # empty is fine
    (mine / "model.safetensors").rename(mine / "chapter.tex")
    with pytest.raises(ConfigError, match="thesis holds something else than an export"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, mine)
    assert (mine / "chapter.tex").exists()
    with pytest.raises(ConfigError, match="is a file"):
        export_to_hugging_face(_tensors().items(), CONFIG, data, mine / "chapter.tex")


DEEP = ("model.hidden_size=256", "model.num_attention_heads=4", "model.intermediate_size=1024")


def _anonymous_mib() -> float:
    """Resident memory that is not a file's, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def _save_deep(world: World, plan: TrainingPlan, run_dir: Path) -> tuple[float, float]:
    """MiB of a saved model, and of its largest parameter."""
    fragments = [
        Fragment(name, shape, 0, numel, {MASTER: torch.zeros(numel)}, Cut(numel, numel))
        for name, shape in parameter_shapes(plan.model_config(24)).items()
        for numel in [math.prod(shape)]
    ]
    save_now(
        run_dir,
        fragments,
        world,
        manifest.Contents(
            step=1,
            optimizer_step=0,
            num_hidden_layers=24,
            zero_stage=0,
            vocabulary_sha256=plan.data.shards.manifest.vocabulary_sha256,
            data_sha256=plan.data.sha256,
            train_state={"step": 1},
            config={},
        ),
    )
    mib = [4 * fragment.numel / 2**20 for fragment in fragments]
    return sum(mib), max(mib)


def _export(_: World, plan: TrainingPlan, run_dir: Path) -> float:
    """MiB by which exporting raises this process's memory at its peak."""
    before, peak, over = _anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.0005):
            peak = max(peak, _anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    export_run(plan.config, run_dir, choose(run_dir))
    over.set()
    watcher.join()
    return peak - before


def test_exporting_a_run_needs_memory_for_a_parameter_and_not_for_a_model(tmp_path: Path) -> None:
    plan = open_plan(small_recipe(tmp_path, tiny_shards(tmp_path), *DEEP))
    model_mib, largest_mib = run_ranks(_save_deep, 1, plan, tmp_path / "run")[0]
    risen_mib = run_ranks(_export, 1, plan, tmp_path / "run")[0]
    assert model_mib > 70 * largest_mib
    assert risen_mib < 10 * largest_mib

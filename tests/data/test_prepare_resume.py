"""Killed at any moment, shared out to any number of processes: the folder is the same."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from stacking_ds.cli import main
from stacking_ds.data.shard_files import read_manifest
from stacking_ds.data.shards import TokenShards
from stacking_ds.data.sources.documents import split_sentences
from stacking_ds.data.tokenizer import build_tokenizer
from stacking_ds.errors import DataError
from tests import prose
from tests.prose import prepare
from tests.token_shards import sentence_lengths_of

ROOT = Path(__file__).parents[2]
# several units, several chunks a unit
SIZES = {"unit_bytes": 20_000, "shard_characters": 6_000}
SMALL = {"vocab_size": 400, "heldout_fraction": 0.1} | SIZES


def content(folder):
    assert all(path.is_file() for path in folder.iterdir()), list(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three kinds of files, one larger than a unit, with duplicates within and between them."""
    folder = tmp_path_factory.mktemp("corpus")
    prose.write_text(folder / "a.txt", 70)
    texts = [*prose.documents(30, seed=1), "", *prose.documents(10)]
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8"
    )
    prose.write_text(folder / "c.txt", 5, seed=3)
    return folder


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    prepare(str(corpus), out, **SMALL)
    assert len({name.split("-")[1] for name in content(out) if name.startswith("train-0")}) >= 4
    return content(out)


def start(program, *arguments):
    """A process group of its own that runs `program`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# Kills itself at the n-th rename or flush, before it or after it, for n = 0, 1, 2 ...; then goes
# on without being killed. Prints a line for each n.
KILLED_EVERYWHERE = """
    import hashlib, os, shutil, signal, sys
    from pathlib import Path
    from stacking_ds.data.sources.documents import split_sentences
    from tests.prose import prepare

    import pandas  # pyarrow does, and it takes long
    split_sentences("Loads the rules. Once.")
    corpus, out, options = sys.argv[1], Path(sys.argv[2]), eval(sys.argv[3])

    def child(kill_at, after):
        pid = os.fork()
        if pid == 0:
            count = 0
            def killing(call):
                def wrapped(*arguments):
                    nonlocal count
                    count += 1
                    if count == kill_at and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    call(*arguments)
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                return wrapped
            os.replace, os.fsync = killing(os.replace), killing(os.fsync)
            prepare(corpus, out, **options)
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    for kill_at in range(1, 10**6, int(sys.argv[4])):
        killed = [child(kill_at, after) for after in (False, True)]
        assert child(0, False) == 0
        digest = hashlib.sha256()
        for path in sorted(out.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        print(kill_at, killed, digest.hexdigest(), flush=True)
        shutil.rmtree(out)
        if killed == [0, 0]:
            break
"""


@pytest.mark.parametrize(
    "step", [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_killed_at_each_rename_and_flush_the_folder_is_the_same(corpus, tmp_path, step):
    options = SMALL | {"unit_bytes": 40_000, "shard_characters": 20_000}
    with start(KILLED_EVERYWHERE, corpus, tmp_path / "out", options, step) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = [line.split(" ", 1) for line in output.splitlines()]
    assert len(lines) * step > 40
    killed = [line for _, line in lines if "[9, " in line]
    assert len(killed) >= len(lines) - 1
    assert len({line.rsplit(" ", 1)[1] for _, line in lines}) == 1


IN_WORKERS = """
    import sys
    from pathlib import Path
    from tests.prose import prepare
    options = eval(sys.argv[3])
    def progress(now):
        print(now.task, now.documents, flush=True)
    prepare(sys.argv[1], Path(sys.argv[2]), **options, progress=progress)
"""


@pytest.mark.slow
def test_a_group_of_workers_killed_at_random_moments(tmp_path):
    moments = random.Random(1)
    text = prose.write_text(tmp_path / "a.txt", 2500)
    options = {"vocab_size": 400, "unit_bytes": 500_000, "shard_characters": 30_000}
    prepare(str(text), tmp_path / "alone", **options)
    out, kills = tmp_path / "out", 0
    for attempt in range(40):
        with start(IN_WORKERS, text, out, options | {"workers": moments.choice((1, 2, 3))}) as run:
            try:
                # later ones live longer, so that a slow machine comes to an end
                run.communicate(timeout=moments.uniform(0.5, 3) * (1 + attempt / 4))
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.communicate()
                kills += 1
            else:
                assert run.returncode == 0
                break
    assert kills
    assert content(out) == content(tmp_path / "alone")


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_write_the_same_bytes(corpus, expected, tmp_path, workers):
    assert not prepare(str(corpus), tmp_path / "out", **SMALL, workers=workers).reused
    assert content(tmp_path / "out") == expected


def test_parts_in_any_order_write_the_same_bytes(corpus, expected, tmp_path):
    out = tmp_path / "out"
    first = prepare(str(corpus), out, **SMALL, part=(3, 3))
    assert first.manifest is None
    assert first.missing_units > 0
    with pytest.raises(DataError, match="out is unfinished: run the same `stacking-ds prepare`"):
        read_manifest(out)
    second = prepare(str(corpus), out, **SMALL, part=(1, 3), workers=2)
    assert 0 < second.missing_units < first.missing_units
    # the array starts again, with other numbers
    assert prepare(str(corpus), out, **SMALL, part=(2, 2)).manifest is None
    last = prepare(str(corpus), out, **SMALL, part=(1, 2))
    assert (last.missing_units, last.reused) == (0, False)
    assert content(out) == expected
    assert prepare(str(corpus), out, **SMALL, part=(2, 2)).reused


def test_a_slurm_array_finds_its_part(corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["prepare", str(corpus), "--out", str(out), "--part", "auto", "--workers", "1"]
    heldout = prose.write_text(tmp_path / "heldout.txt", 5, seed=8)
    command += ["--vocab-size", "400", "--heldout", str(heldout)]
    assert main(command) == 2
    assert "--part auto needs the environment of a SLURM array job" in capsys.readouterr().err
    for name, value in (("MIN", 4), ("MAX", 8), ("STEP", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "part 2 of 2 done" in said
    assert "is unfinished: 1 units are missing" in said
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert main(command) == 0
    assert "prepared in" in capsys.readouterr().out
    assert main([*command[:5], "0/3", *command[6:]]) == 2
    assert "part 0 of 3 does not exist" in capsys.readouterr().err


def test_a_damaged_shard_is_made_again_and_others_are_kept(corpus, expected, tmp_path):
    out = tmp_path / "out"
    prepare(str(corpus), out, **SMALL, part=(1, 2))
    shards = sorted(out.glob("train-00000-*.arrow"))
    damaged = bytearray(shards[1].read_bytes())
    damaged[-100] ^= 1
    shards[1].write_bytes(damaged)
    before = {path: path.stat().st_ino for path in out.glob("*.arrow")}
    prepare(str(corpus), out, **SMALL)
    made_again = {path for path, inode in before.items() if path.stat().st_ino != inode}
    assert shards[0] not in made_again
    assert shards[1] in made_again
    assert all(path.name.split("-")[1] == "00000" for path in made_again)
    assert content(out) == expected


def test_sources_that_change_meanwhile_are_noticed(corpus, expected, tmp_path):
    source = tmp_path / "corpus"
    source.mkdir()
    for path in corpus.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    prepare(str(source), out, **SMALL, part=(1, 2))
    # touched only: read again and found to be the same
    os.utime(source / "a.txt")
    assert prepare(str(source), out, **SMALL, part=(1, 2)).manifest is None
    text = (source / "a.txt").read_text()
    (source / "a.txt").write_text(text.replace("river", "RIVER"))
    with pytest.raises(DataError, match=r"a\.txt has changed, or was touched"):
        prepare(str(source), out, **SMALL)
    with pytest.raises(DataError, match="shard_characters is 6000 there and 7000 here"):
        prepare(str(source), out, **(SMALL | {"shard_characters": 7000}))
    with pytest.raises(DataError, match=r"heldout_fraction is 0\.1 there"):
        prepare(str(source), out, **(SMALL | {"heldout_fraction": 0.2}))
    (source / "a.txt").write_text(text)
    prepare(str(source), out, **SMALL)
    assert content(out) == expected
    # finished: older files are trusted, newer ones are read
    assert prepare(str(source), out, **SMALL).reused
    (source / "a.txt").write_text(text.replace("river", "RIVER"))
    later = time.time() + 5
    os.utime(source / "a.txt", (later, later))
    with pytest.raises(DataError, match=r"prepared otherwise \(.*a\.txt has changed since\)"):
        prepare(str(source), out, **SMALL)


def workers():
    # other tests have left pytest a fork server and its like
    mine = psutil.Process().children()
    return [child for child in mine if "stacking_ds.data.pool" in child.cmdline()]


def test_what_was_begun_with_other_lines_is_not_gone_on_with(tmp_path):
    texts = list(prose.documents(60))
    (tmp_path / "a.txt").write_text("\n\n".join(texts), "utf-8")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows, "utf-8")
    for name in ("a.txt", "a.jsonl"):
        out = tmp_path / f"of-{name}"
        assert prepare(str(tmp_path / name), out, part=(1, 2), **SMALL).missing_units
        path = out / ".unfinished" / "started.json"
        begun = json.loads(path.read_text())
        # as earlier versions wrote it
        assert begun["settings"].pop("lines") == (2 if name == "a.txt" else 1)
        path.write_text(json.dumps(begun))
    with pytest.raises(DataError, match=r"prepared otherwise \(lines is 1 there and 2 here\)"):
        prepare(str(tmp_path / "a.txt"), tmp_path / "of-a.txt", part=(2, 2), **SMALL)
    done = prepare(str(tmp_path / "a.jsonl"), tmp_path / "of-a.jsonl", part=(2, 2), **SMALL)
    assert done.manifest is not None


def test_a_killed_worker_is_one_sentence_and_its_work_goes_on(corpus, expected, tmp_path):
    out = tmp_path / "out"
    killed = []

    def kill_one(now):
        if now.task == "shards" and not killed:
            killed.extend(workers()[:1])
            killed[0].kill()

    with pytest.raises(
        DataError, match=r"worker was killed by SIGKILL, as when memory runs out, while it did unit"
    ):
        prepare(str(corpus), out, **SMALL, workers=2, progress=kill_one)
    assert not workers()
    assert not (out / "manifest.json").exists()
    prepare(str(corpus), out, **SMALL, workers=2)
    assert content(out) == expected


def test_workers_die_with_their_parent_and_load_no_torch(corpus, tmp_path):
    with start(IN_WORKERS, corpus, tmp_path / "out", SMALL | {"workers": 2}) as run:
        while "shards" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGSTOP)
        workers = psutil.Process(run.pid).children()
        assert len(workers) == 2
        mapped = {Path(part.path).name for worker in workers for part in worker.memory_maps()}
        assert any("arrow" in name for name in mapped)
        assert not any("torch" in name for name in mapped)
        run.kill()
        run.communicate()
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert len(gone) == 2
        assert not alive


def test_an_idle_worker_ends_when_nobody_writes_to_it():
    worker = "from stacking_ds.data.pool import main; main()"
    with subprocess.Popen([sys.executable, "-c", worker], cwd=ROOT, stdin=subprocess.PIPE) as idle:
        idle.stdin.close()
        try:
            assert idle.wait(timeout=60) == 0
        finally:
            idle.kill()


def test_every_sentence_of_every_document_is_there(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(str(corpus), out, **SMALL)
    shards = TokenShards.open(out, verify=True)
    tokenizer = build_tokenizer(shards.vocabulary)
    texts = [text for text in (corpus / "a.txt").read_text().split("\n\n") if text.strip()]
    texts += [json.loads(line)["text"] for line in (corpus / "b.jsonl").open()]
    texts += [text for text in (corpus / "c.txt").read_text().split("\n\n") if text.strip()]
    expected = [
        [tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in sentences]
        for sentences in map(split_sentences, texts)
        if sentences
    ]
    found = {"train": [], "heldout": []}
    for name, documents in found.items():
        split = shards.split(name)
        for k in range(split.num_documents):
            ids, ends = split.tokens_of(k).tolist(), sentence_lengths_of(split, k).cumsum().tolist()
            documents.append([ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)])
    kept = [document for document in expected if document not in found["heldout"]]
    assert found["train"] == kept
    assert sorted(found["heldout"] + found["train"]) == sorted(expected)
    # the ten documents that occur twice count once
    counted = shards.manifest.train.documents + shards.manifest.heldout.documents
    assert counted == len(expected) - 10
    assert shards.manifest.duplicate_documents == 10


MEASURED = """
    import resource, sys
    from pathlib import Path
    from tests.prose import prepare
    prepare(sys.argv[1], Path(sys.argv[2]), vocabulary=Path(sys.argv[3]), unit_bytes=2**30,
            shard_characters=2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    prepare(str(prose.write_text(tmp_path / "a.txt", 60)), tmp_path / "vocab", vocab_size=400)
    texts = list(prose.documents(3000))
    peak_kib = []
    for times in (1, 4):
        path = tmp_path / f"{times}.jsonl"
        with path.open("w") as file:
            for turn in range(times):
                file.writelines(json.dumps({"text": f"{turn} {text}"}) + "\n" for text in texts)
        out = tmp_path / f"out-{times}"
        with start(MEASURED, path, out, tmp_path / "vocab" / "vocab.txt") as run:
            output, errors = run.communicate()
        assert run.returncode == 0, errors
        peak_kib.append(int(output))
    assert peak_kib[1] < peak_kib[0] + 40_000, peak_kib

"""Conversion: what is written, the same bytes always, interruption, and what can go wrong."""

import errno
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from store_models import DENSE, KEPT, convert_model, hashes, plan_of, write_model

from mer.errors import CheckpointError, ConfigError, MerError
from mer.weights import formats
from mer.weights import partial as partial_module
from mer.weights.checkpoint import open_checkpoint
from mer.weights.experts import stored
from mer.weights.rows import expert_rows
from mer.weights.store_layout import ALIGN
from mer.weights.verify import verify


def expert_values(store, layer, e):
    extents = stored(store, layer, e)
    name = f"{layer}.{e}"
    return [(m.format, expert_rows(store, extents, m, name).read(0, m.rows)) for m in extents.matrices]


def as_stored(form, values):
    return form.dequantize(form.quantize(values))


@pytest.mark.parametrize("experts", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", None])
@pytest.mark.parametrize("dense", ["bf16", "q8_0", "q4_k", None])
def test_every_tensor_arrives(tmp_path, experts, dense):
    tensors = write_model(tmp_path / "src")
    report = convert_model(tmp_path / "src", tmp_path / "dst", experts, dense)
    assert not (tmp_path / "dst.partial").exists()
    store = open_checkpoint(tmp_path / "dst")
    assert store.kind == "store"
    assert store.config == {"model_type": "test"}
    assert (tmp_path / "dst/tokenizer.json").read_text() == '{"tokens": []}'
    assert set(store.tensors) == set(DENSE)
    assert report.left_out == ["unused.weight"]
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "dst").iterdir())
    for name in DENSE:
        info = store.tensors[name]
        assert info.shape == tensors[name].shape
        wanted = formats.F32 if name in KEPT or dense is None else formats.by_name(dense)
        if name == "odd.weight" and wanted.block > 1:  # rows of 40
            wanted = formats.F16
        assert info.format is wanted
        np.testing.assert_array_equal(store.numpy(name), as_stored(wanted, tensors[name]))
    for layer in (0, 2):
        for e in range(3):
            extents = stored(store, layer, e)
            (piece,) = extents.pieces
            assert piece.offset % ALIGN == 0
            assert piece.nbytes % ALIGN == 0
            for part, (form, values) in zip(
                ("gate", "up", "down"), expert_values(store, layer, e), strict=True
            ):
                wanted = formats.by_name(experts or "f32")
                if part == "down" and wanted is formats.Q4_K:  # rows of 96
                    wanted = formats.Q8_0
                assert form is wanted
                np.testing.assert_array_equal(values, as_stored(wanted, tensors[f"{layer}.{e}.{part}"]))
    assert verify(store) == []


def test_says_which_tensors_got_another_format(tmp_path):
    write_model(tmp_path / "src")
    report = convert_model(tmp_path / "src", tmp_path / "dst", "q4_k", "q4_k")
    found = {(s.what, s.cols, s.wanted.name, s.got.name, s.count) for s in report.substitutions}
    assert found == {
        ("odd.weight", 40, "q4_k", "f16", 1),
        ("layers.*.experts.*.down", 96, "q4_k", "q8_0", 6),
    }
    assert set(report.formats) == {"q4_k", "q8_0", "f16", "f32"}
    assert report.formats["q8_0"] == 6 * 256 * 96 // 32 * 34


def test_a_half_float_source_keeps_its_bytes_and_falls_back_to_itself(tmp_path):
    tensors = write_model(tmp_path / "src", dtype=np.float16)
    convert_model(tmp_path / "src", tmp_path / "dst", None, "q4_0")
    store = open_checkpoint(tmp_path / "dst")
    assert store.tensors["odd.weight"].format is formats.F16
    assert store.read("odd.weight").tobytes() == tensors["odd.weight"].tobytes()
    for part, (form, values) in zip(("gate", "up", "down"), expert_values(store, 2, 1), strict=True):
        assert form is formats.F16
        np.testing.assert_array_equal(values, tensors[f"2.1.{part}"].astype(np.float32))


def test_a_store_can_be_converted_again(tmp_path):
    tensors = write_model(tmp_path / "src")
    convert_model(tmp_path / "src", tmp_path / "a", "f32", "f32")
    convert_model(tmp_path / "a", tmp_path / "b", "q4_k", None)
    convert_model(tmp_path / "src", tmp_path / "c", "q4_k", None)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "c")
    gate = expert_values(open_checkpoint(tmp_path / "b"), 0, 0)[0][1]
    np.testing.assert_array_equal(gate, as_stored(formats.Q4_K, tensors["0.0.gate"]))


def test_same_bytes_on_every_run(tmp_path, monkeypatch):
    write_model(tmp_path / "src", dtype=np.float16)
    convert_model(tmp_path / "src", tmp_path / "a", "q4_k", "q8_0")
    monkeypatch.setattr("mer.weights.encode._SLAB", 3000)  # slabs of a few rows: the same bytes all the same
    convert_model(tmp_path / "src", tmp_path / "b", "q4_k", "q8_0")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_many_files(tmp_path):
    write_model(tmp_path / "src")
    convert_model(tmp_path / "src", tmp_path / "one", "q8_0")
    convert_model(tmp_path / "src", tmp_path / "two", "q8_0", max_file=300_000)
    store = open_checkpoint(tmp_path / "two")
    assert [file.name for file in store.files] == [
        "dense.safetensors", "experts-00001.safetensors", "experts-00002.safetensors"
    ]  # fmt: skip
    one = open_checkpoint(tmp_path / "one")
    for layer in (0, 2):
        for (_, a), (_, b) in zip(expert_values(one, layer, 2), expert_values(store, layer, 2), strict=True):
            np.testing.assert_array_equal(a, b)


SLOW_RUN = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from store_models import convert_model
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.02)
convert_model(Path({src!r}), Path({dst!r}), "q4_k", "q8_0", progress=progress)
"""


def start_conversion(src, dst):
    code = SLOW_RUN.format(path=sys.path, src=str(src), dst=str(dst))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("finished", [1, 4, 9])
def test_killed_and_resumed(tmp_path, finished):
    """SIGKILL after some tensors; the second run takes them over and writes the same bytes."""
    write_model(tmp_path / "src")
    dst = tmp_path / "dst"
    child = start_conversion(tmp_path / "src", dst)
    for _ in range(finished):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not dst.exists()
    assert (tmp_path / "dst.partial").is_dir()
    # As if it had been killed in the middle of a line of the journal.
    journal = tmp_path / "dst.partial" / partial_module.JOURNAL
    with journal.open("ab") as file:
        file.write(b'["dense.safetensors", "bi')
    report = convert_model(tmp_path / "src", dst, "q4_k", "q8_0")
    assert report.resumed >= finished
    assert not (tmp_path / "dst.partial").exists()
    convert_model(tmp_path / "src", tmp_path / "whole", "q4_k", "q8_0")
    assert hashes(dst) == hashes(tmp_path / "whole")


def test_all_is_durable_before_it_has_the_final_name(tmp_path, monkeypatch):
    write_model(tmp_path / "src")
    dst, events = tmp_path / "dst", []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recorded_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    convert_model(tmp_path / "src", dst, "q4_k", "q8_0")
    before, after = set(events[: events.index("rename")]), set(events[events.index("rename") :])
    assert before == {path.stat().st_ino for path in [dst, *dst.iterdir()]}
    assert {dst.stat().st_ino, tmp_path.stat().st_ino} <= after  # the name, and that the journal is gone


def interrupted(tmp_path, after=5):
    """A conversion that stopped after some tensors."""
    write_model(tmp_path / "src")
    count = 0

    def progress(done, total):
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_model(tmp_path / "src", tmp_path / "dst", "q4_k", "q8_0", progress=progress)
    return tmp_path / "dst.partial"


def test_what_is_damaged_is_not_taken_over(tmp_path):
    partial = interrupted(tmp_path)
    with (partial / "dense.safetensors").open("r+b") as file:
        file.seek(ALIGN + 10)
        file.write(b"damage")
    report = convert_model(tmp_path / "src", tmp_path / "dst", "q4_k", "q8_0")
    assert report.resumed == 4
    assert verify(open_checkpoint(tmp_path / "dst")) == []


def test_another_conversion_is_not_continued(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(ConfigError, match=r"dst\.partial: an unfinished conversion .*--restart"):
        convert_model(tmp_path / "src", tmp_path / "dst", "q8_0", "q8_0")
    assert convert_model(tmp_path / "src", tmp_path / "dst", "q8_0", "q8_0", restart=True).resumed == 0


def test_a_changed_source_is_not_continued(tmp_path):
    interrupted(tmp_path)
    os.utime(tmp_path / "src/model-00001-of-00002.safetensors", ns=(1, 1))
    with pytest.raises(ConfigError, match="another source"):
        convert_model(tmp_path / "src", tmp_path / "dst", "q4_k", "q8_0")


def test_two_at_once(tmp_path):
    write_model(tmp_path / "src")
    child = start_conversion(tmp_path / "src", tmp_path / "dst")
    child.stdout.readline()
    with pytest.raises(ConfigError, match="another conversion is writing here"):
        convert_model(tmp_path / "src", tmp_path / "dst", "q4_k", "q8_0")
    child.stdout.read()
    assert child.wait() == 0
    assert verify(open_checkpoint(tmp_path / "dst")) == []


def test_an_existing_destination_is_left_alone(tmp_path):
    write_model(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("dst", "link"):
        with pytest.raises(ConfigError, match="exists already"):
            convert_model(tmp_path / "src", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dst", "link", "src"]


@pytest.mark.parametrize("after", [0, 3, 40])
def test_disk_full(tmp_path, monkeypatch, after):
    """Whichever write finds the disk full: a clear error, no DST, and the run goes on after room was made."""
    write_model(tmp_path / "src")
    real, calls = os.pwrite, 0

    def pwrite(descriptor, data, offset):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: len(data) // 2 + 1], offset)  # short writes besides

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(MerError, match=r"No space left on device; make room; .*dst.partial"):
        convert_model(tmp_path / "src", tmp_path / "dst")
    monkeypatch.undo()
    assert not (tmp_path / "dst").exists()
    convert_model(tmp_path / "src", tmp_path / "dst")
    convert_model(tmp_path / "src", tmp_path / "whole")
    assert hashes(tmp_path / "dst") == hashes(tmp_path / "whole")


def test_a_file_size_limit(tmp_path):
    """The kernel itself refuses the write here."""
    write_model(tmp_path / "src")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try:
        with pytest.raises(MerError, match="File too large; make room"):
            convert_model(tmp_path / "src", tmp_path / "dst")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "dst").exists()


def test_too_little_room_is_said_before_work_begins(tmp_path, monkeypatch):
    write_model(tmp_path / "src")
    usage = partial_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(partial_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MerError, match=r"0\.00 GB are needed|GB are free"):
        convert_model(tmp_path / "src", tmp_path / "dst")


def test_a_source_that_ends_early_or_is_not_finite(tmp_path):
    write_model(tmp_path / "src")
    checkpoint = open_checkpoint(tmp_path / "src")
    info = checkpoint.tensors["2.1.up"]
    file = checkpoint.files[info.file]
    with file.open("r+b") as out:
        out.seek(info.offset + 4000)
        out.write(np.array([np.nan], np.float32).tobytes())
    with pytest.raises(CheckpointError, match=r"model-0000.*up of layers.2.experts.1 holds NaN"):
        convert_model(tmp_path / "src", tmp_path / "dst")
    (bad,) = verify(checkpoint)
    assert (bad.tensor, bad.what) == ("2.1.up", "it holds NaN or infinity")
    os.truncate(file, info.offset + 10)
    with pytest.raises(CheckpointError, match="truncated"):
        convert_model(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_experts_of_different_shapes(tmp_path):
    write_model(tmp_path / "src", layers=(0,))
    write_model(tmp_path / "other", layers=(0,), inter=64)
    checkpoint = open_checkpoint(tmp_path / "src")
    plan = plan_of(checkpoint, layers=(0,))
    plan.layers[0].experts[2] = plan_of(open_checkpoint(tmp_path / "other"), layers=(0,)).layers[0].experts[2]
    from mer.weights.plan import lay_out

    with pytest.raises(CheckpointError, match=r"gate of layers.0.experts.2 is 64 x 256.*96 x 256"):
        lay_out(checkpoint, plan, formats.Q8_0, None)


MEMORY_RUN = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from store_models import convert_model
shape = dict(layers=(0,), experts=2)
def peak():
    # Not getrusage: it has the peak of whoever started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
convert_model(Path({src!r}), Path({dst!r}), "q8_0", "bf16", shape=shape)
print(peak() - before)
"""


def test_memory_stays_flat(tmp_path):
    """Experts of 200 MB in f32 each are converted within 150 MB."""
    write_model(tmp_path / "src", layers=(0,), experts=2, hidden=4096, inter=4096)
    code = MEMORY_RUN.format(path=sys.path, src=str(tmp_path / "src"), dst=str(tmp_path / "dst"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 150 << 10

"""`shoal runs`, `shoal predict`, `shoal doctor`, `shoal new`: on a run that was trained here."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from shoal.cli import doctor, jax_probe

from .conftest import Shoal


def last(text: str) -> str:
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def test_list_shows_a_run_in_a_line(trained: Path, place: Path, shoal: Shoal) -> None:
    made = shoal("runs", "list", trained.parent)
    line = next(line for line in made.out.splitlines() if str(trained) in line)
    assert made.code == 0 and "line" in line and "simulate" in line and "finished" in line and " 20 " in line
    document = shoal("runs", "list", trained, "--json").json
    assert [run["version"] for run in document] == [20] and document[0]["metrics"]["error"] < 0.1


def test_list_of_nothing(tmp_path: Path, shoal: Shoal) -> None:
    made = shoal("runs", "list", tmp_path)
    assert made.code == 0 and "no runs" in made.err
    made = shoal("runs", "list", tmp_path / "nowhere")
    assert made.code == 1 and "no folder" in last(made.err)


def test_show_tells_everything(trained: Path, shoal: Shoal) -> None:
    made = shoal("runs", "show", trained)
    assert made.code == 0, made
    for part in (
        "config",
        "provenance",
        "plan",
        "rounds: 20 committed",
        "goal (20)",
        "metrics",
        "error",
        "█",
        "compute",
    ):
        assert part in made.out, part
    document = shoal("runs", "show", trained, "--json").json
    assert len(document["rounds"]) == 20 and document["plan"]["programs"].startswith("begin, block")
    assert document["curves"]["server error"][-1][0] == 20 and "plan_blob" not in document["config"]


def test_a_newer_record_is_refused_and_left_as_it_is(trained: Path, tmp_path: Path, shoal: Shoal) -> None:
    import shutil

    newer = tmp_path / "newer"
    shutil.copytree(trained, newer)
    with sqlite3.connect(newer / "record.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    connection.close()
    before = (newer / "record.sqlite").read_bytes()
    for arguments in (
        ("runs", "show", newer),
        ("predict", newer, "x.npy"),
        ("host", "--resume", "--run", newer, "--port", 0),
    ):
        np.save(tmp_path / "x.npy", np.zeros(2, np.float32))
        made = shoal(*(tmp_path / "x.npy" if a == "x.npy" else a for a in arguments))
        assert made.code == 1 and "schema 99" in last(made.err), made
    listed = shoal("runs", "list", newer)
    assert listed.code == 0 and "left out" in listed.err and "schema 99" in listed.err
    assert (newer / "record.sqlite").read_bytes() == before


def test_predict_from_fields_and_from_a_bare_array(trained: Path, tmp_path: Path, shoal: Shoal) -> None:
    x = np.array([0.0, 1.0, 2.0], np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    made = shoal("predict", trained, tmp_path / "in.npz", "--json")
    assert made.code == 0 and made.err == "", "the prediction does not read y: no word about it"
    assert made.json["prediction"] == pytest.approx([1, 4, 7], abs=0.3) and made.json["version"] == 20
    assert (
        shoal("predict", trained, tmp_path / "in.npz", "--id", "line", "--json").json["prediction"]
        == made.json["prediction"]
    )
    written = shoal("predict", trained, tmp_path / "in.npz", "--version", 0, "--out", tmp_path / "out.npz")
    assert written.code == 0 and last(written.out) == f"wrote: {tmp_path / 'out.npz'}", written
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["prediction"].tolist() == [0, 0, 0]


def test_what_predict_cannot_use(trained: Path, tmp_path: Path, shoal: Shoal) -> None:
    np.savez(tmp_path / "odd.npz", z=np.zeros(3, np.float32))
    np.savez(tmp_path / "label.npz", y=np.zeros(3, np.float32))
    np.save(tmp_path / "x.npy", np.zeros(3, np.float32))
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    for arguments, expected in {
        (trained, tmp_path / "missing.npz"): "missing.npz",
        (trained, tmp_path / "missing.npy"): "No such file",
        (trained, tmp_path / "broken.npy"): "broken.npy",
        (trained, tmp_path / "in.txt"): ".npz",
        (trained, tmp_path / "odd.npz"): "given: z",
        (trained, tmp_path / "label.npz"): "x is missing",
        (trained, tmp_path / "x.npy"): "fits",
        (trained, tmp_path / "odd.npz", "--version", 99): "99",
        (trained, tmp_path / "odd.npz", "--out", tmp_path / "o.txt"): "--out",
        (trained, tmp_path / "odd.npz", "--id", "lime"): "(line) or the id of a run, got 'lime'",
        (tmp_path, tmp_path / "odd.npz"): "run folder",
    }.items():
        made = shoal("predict", *arguments)
        assert made.code == 1 and expected in last(made.err), made


@pytest.fixture
def no_jax_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_probe, "ask_jax", lambda: jax_probe.JaxSaid(("cpu",), 0.4, 0.1))


@pytest.mark.usefixtures("no_jax_probe")
def test_doctor_has_a_line_for_each_question(trained: Path, shoal: Shoal) -> None:
    made = shoal("doctor", trained)
    assert made.code == 0, made
    lines = made.out.splitlines()[:-1]
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    names = [line.split()[1] for line in lines]
    assert names == [
        "machine",
        "memory",
        "disk",
        "python",
        "libraries",
        "accelerators",
        "compiler",
        "iree",
        "port",
        "clock",
        "cache",
        "record",
    ]
    assert shoal("doctor", "--json").json["ok"] is True


@pytest.mark.usefixtures("no_jax_probe")
def test_doctor_fails_with_what_to_do(tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Finding:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "port", broken)
    made = shoal("doctor", tmp_path)
    assert made.code == 1 and last(made.err) == "shoal: this machine is not fit: port, record.", made
    assert "fail  port          no such thing" in made.out


@pytest.mark.integration
@pytest.mark.slow
def test_jax_is_asked_in_a_process_of_its_own() -> None:
    said = jax_probe.ask_jax()
    assert said.kinds and said.compile_s > 0


def test_new_writes_a_task_and_never_overwrites(tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = shoal("new", "my digits")
    assert made.code == 0 and made.out.count("  shoal ") == 3, made
    before = (tmp_path / "my digits.py").read_text()
    assert 'name="my-digits"' in before
    again = shoal("new", "my digits")
    assert again.code == 1 and "exists" in last(again.err) and (tmp_path / "my digits.py").read_text() == before
    assert shoal("new", "no/such/folder/x").code == 1 and shoal("new", "...").code == 1


@pytest.mark.slow
def test_predict_with_what_a_device_has_kept(trained: Path, tmp_path: Path, shoal: Shoal) -> None:
    from shoal.api import load
    from shoal.fleet import kept_model

    np.savez(tmp_path / "x.npz", x=np.linspace(-1, 1, 5, dtype=np.float32))
    model, kept = load(trained), tmp_path / "kept"
    kept_model.keep(kept, model.plan, dict(model.tensors), run="a-run", version=model.version)
    of_run = shoal("predict", trained, tmp_path / "x.npz", "--json")
    of_device = shoal("predict", kept, tmp_path / "x.npz", "--json")
    assert of_device.code == 0, of_device
    np.testing.assert_allclose(of_device.json["prediction"], of_run.json["prediction"], rtol=1e-5)
    assert "kept in" in shoal("predict", kept, tmp_path / "x.npz").out
    for options, line in (
        (["--version", "3"], "keeps the newest version"),
        (["--task", "other"], "a model of task 'other'"),
    ):
        made = shoal("predict", kept, tmp_path / "x.npz", *options)
        assert made.code == 1 and line in last(made.err)
    made = shoal("predict", trained, tmp_path / "x.npz", "--device", "anna")
    assert made.code == 1 and "Expected a device's --state folder" in last(made.err)

"""Second moments on several processes: the sums, bit-exact resumption, and errors without a deadlock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.ranks import TESTS, run_ranks
from support.tiny_models import TEXT

from harness_rect import cli
from harness_rect.errors import UserError
from harness_rect.moments import accumulate as module
from harness_rect.moments.accumulate import accumulate
from harness_rect.moments.text import windows
from harness_rect.processes import Processes

NUMBER = 2
BATCH = 60
DOCUMENTS = [*TEXT.splitlines(), "A short one.", "🦜 東京 " * 30]

#: Forks two ranks, which is faster than starting them, to collect and then to collect again and die between
#: two batches, each at its own; and two more, to go on.
RANKS = """
import json, multiprocessing, os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
place, number, size, tests, documents = Path(sys.argv[1]), *json.loads(sys.argv[2])
sys.path.insert(0, tests)
from support.ranks import environments
from support.tiny_models import make_model, train_tokenizer
from harness_rect.models import EditableLM
from harness_rect.processes import Processes
from harness_rect.io import resume
from harness_rect.moments import accumulate as module
from harness_rect.moments.text import windows

module.BATCH_TOKENS, resume.SAVE_SECONDS = size, 0.0

def rank(environment, turns):
    os.environ.update(environment)
    processes = Processes.launched(cuda=False)
    lm = EditableLM(make_model("llama"), train_tokenizer(True))
    sequences, _ = windows(lm, documents, 10_000)
    run = lm.run_hooked
    for turn in turns:
        calls = []

        def counted(*arguments):
            if turn == "killed" and len(calls) == 2 + processes.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            return run(*arguments)

        lm.run_hooked = counted
        sums, count = module.accumulate(lm, [0, 1], sequences, place / ".partial.safetensors", "x", processes)
        found = {"sums": sums, "count": count, "calls": len(calls)}
        torch.save(found, place / f"{turn}{processes.rank}.pt")
    processes.leave()

fork = multiprocessing.get_context("fork")
for turns in ["whole", "killed"], ["resumed"]:
    both = [fork.Process(target=rank, args=(e, turns)) for e in environments(number)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    print([process.exitcode for process in both], len(list(place.glob(".partial.*"))))
"""


@pytest.mark.posix
def test_killed_processes_go_on_and_end_with_the_same_bits(tmp_path, make_lm, monkeypatch) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path), json.dumps([NUMBER, BATCH, str(TESTS), DOCUMENTS])],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    dead = [-int(signal.SIGKILL)] * NUMBER
    assert ended.stdout.splitlines() == [f"{dead} {NUMBER}", f"{[0] * NUMBER} 0"], ended.stderr

    whole, resumed = (
        [torch.load(tmp_path / f"{turn}{rank}.pt", weights_only=True) for rank in range(NUMBER)]
        for turn in ("whole", "resumed")
    )
    for rank in range(NUMBER):
        assert resumed[rank]["calls"] == whole[rank]["calls"] - (2 + rank) > 0
        assert resumed[rank]["count"] == whole[rank]["count"] == whole[0]["count"]
        for layer in (0, 1):
            assert torch.equal(whole[rank]["sums"][layer], whole[0]["sums"][layer])
            assert torch.equal(resumed[rank]["sums"][layer], whole[rank]["sums"][layer])

    monkeypatch.setattr(module, "BATCH_TOKENS", BATCH)
    lm = make_lm("llama")
    sequences, _ = windows(lm, DOCUMENTS, 10_000)
    alone, count = accumulate(lm, [0, 1], sequences, tmp_path / "partial.safetensors", "x")
    assert count == whole[0]["count"]
    assert sum(found["calls"] for found in whole) == len(module._batches(sequences))
    for layer in (0, 1):  # the products of each batch are the same; only the order of the sum is another
        torch.testing.assert_close(whole[0]["sums"][layer], alone[layer], rtol=1e-10, atol=1e-10)


# -- devices ------------------------------------------------------------------------------------------


def test_each_of_several_processes_has_a_gpu_of_its_own() -> None:
    state = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cuda", 1))
    second = Processes(state)
    assert second.own_device(None) == second.own_device("cuda") == "cuda:1"
    with pytest.raises(UserError, match="--device cuda:0"):
        second.own_device("cuda:0")
    assert Processes().own_device("cuda:0") == "cuda:0"
    state.device = torch.device("cpu")
    assert second.own_device("cpu") == "cpu"


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, make_model, bos_tokenizer):
    """``command(output, model=...)``: arguments of a collection of some batches."""
    make_model("llama").save_pretrained(tmp_path / "model")
    bos_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT] * 80), encoding="utf-8")

    def command(output: str, model: str = "model") -> list[str]:
        options = {
            "model": tmp_path / model,
            "layers": "0-1",
            "text": tmp_path / "text.txt",
            "tokens": "9000",
            "device": "cpu",
            "output": tmp_path / output,
        }
        return ["stats", "--float64", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]

    return command


def test_two_launched_processes_write_what_one_does(tmp_path, command, capsys) -> None:
    assert cli.main(command("one")) == 0
    expected = capsys.readouterr().out.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / ".partial.0-of-3.safetensors").write_bytes(b"of three processes once")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUMBER)]
    launched = subprocess.run(
        [sys.executable, *launcher, "-m", "harness_rect", *command("two")],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout == expected
    assert launched.stderr.count("computing second moments") == 1
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 2
    for paths in zip(one, two, strict=True):
        first, second = (dict(np.load(path, allow_pickle=False)) for path in paths)
        sums = first.pop("mom2.mom2"), second.pop("mom2.mom2")
        np.testing.assert_allclose(*sums, rtol=1e-10, atol=1e-10)
        assert first == second


def test_what_one_process_cannot_do_ends_all(tmp_path, command) -> None:
    module = ["-m", "harness_rect"]
    main, other = run_ranks([[*module, *command("out")], [*module, *command("out", model="lost")]])
    assert (main.status, other.status) == (2, 2), main.err + other.err
    assert main.err.count("error: --model") == 1 and "lost" in main.err and "Traceback" not in main.err
    assert "error" not in other.err
    assert main.out == other.out == ""
    assert not (tmp_path / "out").exists()

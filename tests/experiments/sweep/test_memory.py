"""The memory that a dry run tells, against what torch counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.several_devices import Counted, SeveralDevices, over_devices

from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.memory import (
    Part,
    needed,
    parts_in,
    parts_of,
    scored_token,
    skeleton,
    weights_of,
)
from harness_rect.experiments.sweep.plan import ModelEntry, SweepConfig, make_plan
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.session import EditSession

sys.path.insert(0, str(Path(__file__).parents[3]))  # the benchmarks are not installed
try:
    from benchmarks.measuring import peak_allocated
finally:
    sys.path.pop(0)

CPU = torch.device("cpu")


def planned(model: Any, n: int, method: Any) -> tuple[SweepConfig, Any]:
    config = SweepConfig(
        output="out",
        models=[model],
        edits=f"tiny[0:{n}]",
        methods=[method],
        checkpoints=[n],
        tasks=["rect_nli"],
    )
    return config, make_plan(config, "test").trajectories[0]


def entry(**arguments: Any) -> ModelEntry:
    return ModelEntry.model_validate({"pretrained": "rect-tiny"} | arguments)


#: As presets, with fewer steps, which need as much memory.
SHORT = {"layers": [1, 2, 3], "v_num_grad_steps": 3}
#: Norm-anchored scaling with a norm that is measured first, on more facts than are searched together.
NAS = {"layers": [3], "v_num_grad_steps": 2, "nas": True, "nas_samples": 12}


@pytest.mark.parametrize(
    ("model", "dtype", "n", "method"),
    [
        ("rect-tiny", "float32", 2, "rome"),
        ("rect-tiny", "float32", 1, {"method": "rome", "hparams": NAS}),
        ("rect-tiny", "bfloat16", 1, {"method": "memit", "hparams": SHORT}),
        ("rect-tiny", "float32", 4, {"method": "memit", "hparams": SHORT, "edit_batch_size": 2}),
        ("rect-tiny", "float32", 6, {"method": "memit", "hparams": SHORT, "edit_batch_size": 6}),
        ("rect-tiny", "float32", 12, {"method": "memit", "hparams": SHORT, "edit_batch_size": 6}),
        ("rect-tiny", "float32", 2, "ft"),
        ("rect-tiny", "float32", 10, {"method": "mend", "edit_batch_size": 5}),
        ("rect-tiny-llama", "float32", 8, {"method": "alphaedit", "hparams": SHORT, "edit_batch_size": 4}),
    ],
)
def test_it_is_within_15_percent_of_what_torch_counts(
    model: str, dtype: str, n: int, method: Any, tmp_path, monkeypatch
) -> None:
    if "hparams" in method:
        monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path))
        (tmp_path / "hparams.json").write_text(json.dumps(method["hparams"]))
        method = method | {"hparams": str(tmp_path / "hparams.json")}
    config, trajectory = planned({"pretrained": model, "dtype": dtype}, n, method)
    lm = skeleton(config.models[0])
    told = needed(lm, trajectory, config, CPU)
    folder = embedded.resolve_model(model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weights = sum(p.numel() * p.itemsize for p in loaded.parameters())
    assert told.weights == weights
    session = EditSession(loaded, tokenizer, trajectory.config, trajectory.edits, model)
    edited = peak_allocated(lambda: session.run(on_step=lambda done: None), "cpu")
    # Those that are read are numpy's, which torch does not count.
    moments = 4 * lm.architecture.d_mlp**2 * len(session.report.second_moments or ())
    assert told.total == pytest.approx(weights + edited + moments, rel=0.15)


@pytest.mark.parametrize(
    ("model", "n", "method"),
    [
        ("rect-tiny", 4, {"method": "memit", "edit_batch_size": 4}),
        ("rect-tiny-llama", 1, "ft"),
    ],
)
def test_on_each_of_several_devices_too(model: str, n: int, method: Any) -> None:
    config, trajectory = planned(model, n, method)
    folder = embedded.resolve_model(model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    places = over_devices(loaded, 3)
    lm = skeleton(config.models[0])
    told = {
        device: needed(lm, trajectory, config, device, part).total
        for device, part in parts_in(lm, places).items()
    }
    with SeveralDevices():
        session = EditSession(loaded, tokenizer, trajectory.config, trajectory.edits, model)
        with Counted(loaded) as counted:
            session.run(on_step=lambda done: None)
    assert len(told) == 3
    assert told == pytest.approx({device: counted.most[device] for device in told}, rel=0.15)


def test_parallelize_puts_a_model_where_accelerate_does() -> None:
    lm = skeleton(entry())
    size, blocks, names = weights_of(lm), list(range(6)), {name for name, _ in lm.model.named_parameters()}
    assert parts_of(lm, entry(), CPU) == {CPU: Part(names, blocks)}
    spread = entry(parallelize=True, max_cpu_memory=size, offload_folder="x")
    first, second = (torch.device("cuda", i) for i in range(2))
    parts = parts_of(lm, spread, CPU, {0: int(0.7 * size), 1: size})
    assert list(parts) == [first, second] and sum(len(part.parameters) for part in parts.values()) == len(
        names
    )
    assert parts[first].blocks + parts[second].blocks == blocks and parts[first].blocks != blocks
    assert [part.head for part in parts.values()] == [True, False], "tied to the embeddings"
    parts = parts_of(lm, spread, CPU, {0: int(0.7 * size)})
    assert list(parts) == [first, CPU] and parts[first].moving and not parts[CPU].moving
    assert (parts[first].blocks, parts[CPU].blocks) == (blocks, []) and parts[CPU].parameters
    on_disk = parts_in(lm, {"": 1, "transformer.h.5": "disk"})
    assert list(on_disk) == [second] and on_disk[second].blocks == blocks and on_disk[second].moving


@pytest.mark.parametrize(("model", "dtype"), [("rect-tiny", "bfloat16"), ("rect-tiny-llama", "float32")])
@pytest.mark.parametrize("size", [4, 16])
def test_lm_evals_batches_are_within_15_percent_of_what_torch_counts(
    model: str, dtype: str, size: int
) -> None:
    lm = EditedHF(model, method="none", device="cpu", batch_size=size, dtype=dtype)
    length = 32  # of prompt and target, of which the last token is not read
    ids = torch.randint(1, 1000, (3 * size, length), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [((str(row), ""), row[:-2], row[-2:]) for row in ids]
    scored = peak_allocated(lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True), "cpu")
    meta = skeleton(entry(pretrained=model, dtype=dtype))
    told = scored_token(meta, parts_in(meta, {"": CPU})[CPU]) * size * (length - 1)
    assert told == pytest.approx(scored, rel=0.15)


def test_it_follows_dtype_and_shape(tmp_path) -> None:
    shape = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    shape.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(embedded.resolve_model("rect-tiny")).save_pretrained(tmp_path)
    for dtype, size in (("float32", 4), ("float16", 2)):
        config, trajectory = planned({"pretrained": str(tmp_path), "dtype": dtype}, 1, "memit")
        told = needed(skeleton(config.models[0]), trajectory, config, torch.device("cuda"))
        assert told.weights == size * 6_738_415_616  # LLaMA 7B
        assert told.copies == 5 * 4096 * 11008 * (4 + size)  # five layers
        assert told.moments == 5 * 8 * 11008**2


def test_a_model_without_weights_is_read_from_its_configuration_or_named(tmp_path) -> None:
    lm = skeleton(entry(dtype="bfloat16"))
    assert next(lm.model.parameters()).device.type == "meta"
    assert weights_of(lm) == weights_of(skeleton(entry())) // 2
    with pytest.raises(UserError, match=f"models: {tmp_path}: cannot be loaded"):
        skeleton(entry(pretrained=str(tmp_path)))
    with pytest.raises(UserError, match="torch has no dtype float23"):
        skeleton(entry(dtype="float23"))

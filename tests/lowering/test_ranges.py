"""The ring plan: it holds what it says, `explain` shows it, and weights that no plan holds are a conversion error that names the layer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import msgspec
import pytest
import torch

from privinf.graph.planning import Plan, power_of_two
from privinf.local.compare import compare
from privinf.lowering import convert
from privinf.lowering.calibrate import beyond, calibrate, peaks
from privinf.lowering.explain import explain, wires
from privinf.lowering.lowered import Lowered
from privinf.lowering.plan import plan_rings
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.ops.embedding import Embedding
from privinf.ops.last_position import every_position
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from protocols.errors import HandshakeError
from tests.support import trio as t
from tests.support.command import Call, assert_one_line
from tests.support.command import call as call
from tests.support.ladder import LADDER, LOGIT_ERROR, logit_error, make

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}


def scaled(directory: Path, variant: str, parameter: str, factor: float) -> AeroModel:
    """A checkpoint with one parameter multiplied, or of a map to q, k and v that which makes v (`:v`)."""
    config = ladder_config(variant, **SIZES)
    model = AeroModel(config).eval()
    initialise(model, 0)
    with torch.no_grad():
        weight = model.get_parameter(parameter.removesuffix(":v"))
        if parameter.endswith(":v"):
            weight = weight.narrow(weight.shape.index(3 * config.n_embd), 2 * config.n_embd, config.n_embd)
        weight.mul_(factor)
    save_checkpoint(model, config, directory, torch.float32)
    return model


# ---- what cannot be held


REFUSED = [
    ("SM+LN+G", "h.1.attn.c_attn.weight", 1e2, "attention scores reach", "h.1.attn.attention"),
    ("SM+LN+G", "h.1.attn.c_attn.weight:v", 1e7, "values of v", "h.1.attn.attention"),
    ("SM+LN+G", "h.1.mlp.c_fc.weight", 1e5, "too large to be compared", "h.1.mlp.gelu"),
    ("SM+LN+G", "h.1.mlp.c_fc.weight", 1e12, "do not fit a ring of 64 bits", "h.1.mlp.c_fc.linear"),
    ("SM+LN+G", "h.0.mlp.c_proj.weight", 1e12, "do not fit a ring of 64 bits", "h.0.mlp.c_proj.linear"),
    ("SM+LN+G", "h.0.mlp.c_proj.weight", 1e30, "not finite", "h.0.mlp.c_proj.linear"),
    ("SM+LN+R", "h.1.mlp.c_fc.weight", 1e12, "do not fit a ring of 64 bits", "h.1.mlp.c_fc.linear"),
    ("SM+LN+R", "wpe.weight", 1e12, "do not fit a ring of 64 bits", "ln_1"),
    ("SM+ScFuFFN", "wpe.weight", 1e3, "attention scores reach", "h.0.attn.attention"),
    ("SM+ScFuFFN", "wpe.weight", 1e12, "do not fit a ring of 64 bits", "h.0.attn.c_attn.linear"),
    ("SM+ScFuFFN", "h.1.mlp.fused.weight", 1e12, "do not fit a ring of 64 bits", "h.1.mlp.fused.linear"),
    ("SM+ScFuFFN", "lm_head.weight", 1e30, "not finite", "wte.embedding"),
    ("SM+ScFuFFN", "h.1.mlp.fused.weight", float("nan"), "not finite", "h.1.mlp.fused.weight"),
    ("SM+LN+G", "h.0.ln_2.bias", float("inf"), "not finite", "h.0.ln_2.bias"),
]


@pytest.mark.parametrize(("variant", "parameter", "factor", "says", "layer"), REFUSED)
def test_what_no_plan_holds_is_a_conversion_error(
    tmp_path: Path, call: Call, variant: str, parameter: str, factor: float, says: str, layer: str
) -> None:
    scaled(tmp_path / "checkpoint", variant, parameter, 1.0 if factor != factor or factor == float("inf") else factor)
    if factor != factor or factor == float("inf"):  # what `save_checkpoint` does not write
        from safetensors.torch import load_file, save_file

        path = tmp_path / "checkpoint" / "model.safetensors"
        tensors = load_file(path)
        tensors[parameter].view(-1)[-1] = factor
        save_file(tensors, path)
    code, out, err = call("convert", tmp_path / "checkpoint", "-o", tmp_path / "model")
    assert code == 2 and says in err and layer in err and out == "", err
    assert_one_line(err)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("variant", "factor"), [("SM+LN+G", 1e4), ("SM+LN+R", 1e7)])
def test_what_a_plan_just_holds_is_right(tmp_path: Path, variant: str, factor: float) -> None:
    """Pre-activations of thousands, of millions for ReLU."""
    model = scaled(tmp_path, variant, "h.1.mlp.c_fc.weight", factor)
    ids = (1, 2, 3, 4, 5)
    assert logit_error(convert(tmp_path), model, ids) < 0.01


# ---- what is shown


@pytest.mark.parametrize("variant", [*LADDER, "outlier"])
def test_every_wire_holds_its_range(tmp_path: Path, variant: str) -> None:
    lowered, model = make(tmp_path, "SM+LN+G" if variant == "outlier" else variant, outlier=3000.0 if variant == "outlier" else 0.0)
    found = wires(lowered)
    assert all(entry["range"] <= 2.0 ** (entry["bits"] - 1 - entry["frac"]) and entry["bits"] <= 64 for entry in found)
    assert {entry["from"] for entry in found} == {"weights", "calibration x 4", "protocol"}
    planned = {
        bits
        for node in lowered.graph.nodes
        for key, bits in msgspec.structs.asdict(node.plan).items()
        if key in ("ring", "qk_bits", "v_bits", "opened") and not getattr(node.plan, "weight_bits", None)  # a table's, as its head has it
    }
    assert planned <= {entry["bits"] for entry in found}
    (table,) = [entry for entry in found if (entry["op"], entry["wire"]) == ("wte.embedding", "weight")]
    assert table["range"] / 2 < float(model.wte.weight.detach().abs().max()) <= table["range"]
    public = wires(Lowered.from_bundle(lowered.bundle()))
    assert [entry["bits"] for entry in public] == [entry["bits"] for entry in found]
    assert {entry["from"] for entry in public} == {None, "protocol"}


def test_explain_shows_the_plan_to_people(tmp_path: Path, call: Call) -> None:
    make(tmp_path / "checkpoint", "SM+LN+G")
    code, out, _ = call("explain", tmp_path / "checkpoint", "--seq", 4, "--cache", tmp_path / "cache")
    assert code == 0
    plan = out[out.index("ring plan") :].splitlines()
    head = next(number for number, line in enumerate(plan) if line.startswith("operator and wire"))
    assert plan[head].split()[3:] == ["bits", "frac", "up", "to", "from", "layers"]
    lines = [line.split() for line in plan[head + 1 :] if line.startswith("mlp.gelu")]
    assert lines[0][:4] == ["mlp.gelu", "opened", "32", "14"] and lines[0][5:] == ["calibration", "h.0-1"]
    assert any(line.startswith("attn.attention scores") and "protocol" in line and "h.0-1" in line for line in plan)


# ---- what leaves its range at run time


def test_compare_shows_errors_and_warns_beyond_the_plan(tmp_path: Path, call: Call) -> None:
    """A token that no calibration text holds has by far the largest embedding: the pass goes on, is wrong, and that is said."""
    model, config, tokenizer = load_checkpoint(t.checkpoint())
    with torch.no_grad():
        model.wte.weight[t.END] *= 60
    save_checkpoint(model, config, tmp_path / "checkpoint", torch.float32)
    assert tokenizer is not None
    (tmp_path / "checkpoint" / "tokenizer.json").write_bytes(tokenizer)
    common = ("compare", tmp_path / "checkpoint", "--cache", tmp_path / "cache", "--json")
    inside, outside = (json.loads(call(*common, "--prompt-ids", ids).out) for ids in ("1,2,3", f"1,2,{t.END}"))
    assert inside["warnings"] == [] and inside["agree"]
    errors = [abs(a - b) for a, b in zip(inside["logits_private"], inside["logits_float"], strict=True)]
    del errors[t.END]  # the head is tied: that logit is as large as the embedding
    inner = [layer["max_abs_error"] for layer in inside["layers"] if layer["name"] != "lm_head.linear"]
    assert max(errors) < LOGIT_ERROR and max(inner) < LOGIT_ERROR
    assert max(layer["max_abs_error"] for layer in outside["layers"]) > 1 and len(outside["logits_private"]) == t.VOCAB
    named = {line.split(":")[0] for line in outside["warnings"]}
    assert {"h.0.attn.attention", "h.0.attn.c_attn.linear"} <= named and "wte.embedding" not in named
    assert any("a score of" in line and "beyond the planned 120" in line for line in outside["warnings"])


# ---- rows that need no maximum


def test_rows_within_a_range_take_no_maximum_and_explain_says_so(tmp_path: Path, call: Call) -> None:
    lowered, _ = make(tmp_path / "checkpoint", "SM+ScFuFFN")
    plans = [node.plan for node in lowered.graph.nodes if node.op == "attention"]
    assert any(plan.within is not None for plan in plans)
    before = plan_rings(lowered.graph, without_rows(lowered.ranges), lowered.info)
    fewer, more = explain(lowered, 8)["total"], explain(with_plan(lowered, before), 8)["total"]
    assert fewer["rounds"] < more["rounds"]
    code, out, _ = call("explain", tmp_path / "checkpoint", "--seq", 4, "--cache", tmp_path / "cache")
    assert code == 0 and "no maximum, log-mean-exp of rows" in " ".join(out.split())


def test_a_directory_of_before_takes_a_maximum(tmp_path: Path) -> None:
    """Neither its ranges nor its plan say anything of rows."""
    lowered, _ = make(tmp_path / "checkpoint", "SM+ScFuFFN")
    ranges = without_rows(lowered.ranges)
    old = with_plan(lowered, plan_rings(lowered.graph, ranges, lowered.info), ranges)
    old.save(tmp_path / "old")
    assert "row_" not in (tmp_path / "old" / "lowered.json").read_text()
    loaded = Lowered.load(tmp_path / "old")
    assert loaded.id == old.id and explain(loaded, 8) == explain(old, 8)
    assert [node.plan.within for node in loaded.graph.nodes if node.op == "attention"] == [None, None]
    assert beyond(loaded.graph, loaded.ranges, [torch.tensor([[1, 2, 3]])]) == []


@pytest.mark.parametrize("field", ["row_top", "row_depth", "row_spread"])
def test_a_bundle_with_rows_that_no_table_holds_is_refused(tmp_path: Path, field: str) -> None:
    lowered, _ = make(tmp_path / "checkpoint", "SM+ScFuFFN")
    document = json.loads(lowered.bundle())
    plan = document["graph"]["plan"]["h.0.attn.attention"]
    assert Lowered.from_bundle(json.dumps(document).encode()).graph.node("h.0.attn.attention").plan.within is not None
    plan[field] = 64
    with pytest.raises(HandshakeError, match="a range of rows that no table holds"):
        Lowered.from_bundle(json.dumps(document).encode())


def test_rows_far_apart_keep_the_maximum(tmp_path: Path) -> None:
    scaled(tmp_path, "SM+ScFuFFN", "h.1.attn.c_attn.weight", 9.0)
    lowered = convert(tmp_path)
    first, second = (node.plan.within for node in lowered.graph.nodes if node.op == "attention")
    assert first is not None and second is None
    assert any(wire["wire"].startswith("maximum of a row, or the bound") for wire in wires(lowered) if wire["layer"] == "h.1")


def test_a_row_out_of_its_range_is_named(tmp_path: Path) -> None:
    lowered, _ = make(tmp_path, "SM+ScFuFFN")
    ids = torch.arange(12)[None]
    assert beyond(lowered.graph, lowered.ranges, [ids]) == []
    node = next(node for node in lowered.graph.nodes if node.op == "attention" and node.layer == "h.1")
    node.plan = msgspec.structs.replace(node.plan, row_top=0, row_depth=1, row_spread=1)
    with torch.no_grad():
        lowered.graph.node("h.1.attn.c_attn.linear").value("weight")[:, :64].mul_(30)
    lines = beyond(lowered.graph, lowered.ranges, [ids])
    assert any(line.startswith("h.1.attn.attention: a row's ") for line in lines)


def test_a_reply_over_rows_out_of_range_is_that_of_softened_rows(tmp_path: Path) -> None:
    """The scores are six times those that the rings were planned for: by real processes, weights stay weights, and the layer is named."""
    lowered, _ = make(tmp_path / "checkpoint", "SM+ScFuFFN")
    plan = {node.name: node.plan for node in lowered.graph.nodes}
    maker, name = lowered.graph.node("h.0.attn.c_attn.linear"), "h.0.attn.attention"
    assert lowered.graph.node(name).plan.within is not None
    with torch.no_grad():
        width = lowered.info.width
        maker.value("weight")[:, :width].mul_(6)
        maker.value("bias")[:width].mul_(6)
    ids = list(range(3, 15))
    larger = with_plan(lowered, plan)
    larger.save(tmp_path / "model")
    found = compare(tmp_path / "model", ids=ids)
    assert any(line.startswith(f"{name}: a row's ") for line in found["warnings"])
    error = {layer["name"]: layer["max_abs_error"] for layer in found["layers"]}
    largest = peaks(larger.graph, [[torch.tensor([ids])]])[name]["v"]
    assert 1e-3 < error[name] < 2.4 * largest  # of a mean of values that is none of the float model's; what wraps is off by the ring


def test_what_the_last_position_alone_has_is_ranged_on_every_row_and_the_rest_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make(tmp_path, "SM+LN+G")[0].graph
    inputs = [(torch.arange(start, start + count)[None],) for start, count in ((3, 12), (40, 1), (90, 9))]
    found = peaks(graph, inputs)
    with every_position():
        every = peaks(graph, [inputs[0], inputs[2]])
    runs: list[int] = []
    whole = Embedding.generic
    monkeypatch.setattr("privinf.lowering.calibrate.gains", lambda *_: ())  # which runs it as often as it needs
    monkeypatch.setattr(Embedding, "generic", lambda self, *values: runs.append(values[0].shape[1]) or whole(self, *values))
    ranges = calibrate(graph, inputs, headroom=1.0, scored=True)
    assert sorted(runs) == [1, 2, 2, 9, 12]  # the two say which nodes these are
    higher = set()
    for name, entry in found.items():
        for part, peak in entry.items():
            assert ranges[name][part] == max(power_of_two(peak), power_of_two(every.get(name, {}).get(part, 0.0))), (name, part)
            higher |= {name} if ranges[name][part] > power_of_two(peak) else set()
    assert higher  # of some nodes other rows say the range


def without_rows(ranges: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {part: size for part, size in entry.items() if not part.startswith("row_")} for name, entry in ranges.items()}


def with_plan(lowered: Lowered, plan: dict[str, Plan], ranges: dict[str, dict[str, float]] | None = None) -> Lowered:
    return Lowered(copy.deepcopy(lowered.graph), lowered.info, plan=plan, ranges=ranges or lowered.ranges, mask_seed=lowered.mask_seed)

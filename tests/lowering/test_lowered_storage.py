"""A lowered model on disk: round trips, damage, and the inputs by which it was calibrated."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from privinf.lowering import Lowered, load
from privinf.lowering.calibrate import calibration_ids, text_ids
from privinf.lowering.storage import is_lowered
from protocols.errors import ConfigError

VOCAB = 40
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def test_save_and_load(lowered: Lowered, saved: Path) -> None:
    again = load(saved)
    for node, twin in zip(lowered.graph.nodes, again.graph.nodes, strict=True):
        assert all(torch.equal(node.value(key), twin.value(key)) for key in node.parameter_shapes)
    torch.testing.assert_close(again.graph(IDS), lowered.graph(IDS))
    assert (again.info, again.plan, again.ranges, again.tokenizer) == (lowered.info, lowered.plan, lowered.ranges, lowered.tokenizer)
    assert again.mask_seed == lowered.mask_seed and again.headroom == lowered.headroom
    assert [node.plan for node in again.graph.nodes] == [node.plan for node in lowered.graph.nodes]
    assert again.info.eos == (1,) and again.tokenizer is not None
    head, table = again.graph.nodes[-1], again.graph.nodes[0]
    assert head.tied_to == table.name and head.value("weight").data_ptr() == table.value("weight").data_ptr()


def test_files_are_the_owners_alone(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["lowered.json", "mask_seed", "tokenizer.json", "weights.safetensors"]
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert stat.S_IMODE((saved / "mask_seed").stat().st_mode) == 0o600
    assert len((saved / "mask_seed").read_bytes()) == 32
    assert list(saved.parent.iterdir()) == [saved]  # no scratch left


def test_save_replaces_a_lowered_model_and_nothing_else(lowered: Lowered, saved: Path, tmp_path: Path) -> None:
    lowered.save(saved)
    assert is_lowered(saved) and load(saved).info == lowered.info
    other = tmp_path / "other"
    other.mkdir()
    lowered.save(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="something else"):
        lowered.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_a_failed_save_leaves_the_old_model(lowered: Lowered, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("privinf.lowering.storage.save_file", full)
    with pytest.raises(ConfigError, match="No space left"):
        lowered.save(saved)
    monkeypatch.undo()
    assert load(saved).info == lowered.info and list(saved.parent.iterdir()) == [saved]


def test_changed_weights_are_not_kept_under_the_old_masks(saved: Path) -> None:
    """W + B and W' + B give W - W' away, to every client that gets both."""
    model = load(saved)
    with torch.no_grad():
        model.graph.nodes[-1].value("weight").add_(0.25)
    with pytest.raises(ConfigError, match="lower the changed model anew"):
        model.save(saved)
    with pytest.raises(ConfigError, match="lower the changed model anew"):
        model.check_weights()
    load(saved).check_weights()


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def edit(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        document = json.loads((directory / "lowered.json").read_text())
        change(document)
        (directory / "lowered.json").write_text(json.dumps(document))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "weights.safetensors")
        change(tensors)
        save_file(tensors, directory / "weights.safetensors")

    return damage


def older(document: Any) -> None:
    """As the first version of the format was."""
    del document["graph"]["setup"], document["id"]
    document["graph"]["version"] = 1
    document["graph"]["info"]["id"] = "0" * 32


def largest(document: Any) -> Any:
    """The item of the largest masked weight."""
    return max(document["graph"]["setup"]["items"].values(), key=lambda item: item["size"])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda d: (d / "weights.safetensors").unlink(), "weights.safetensors missing"),
    "no structure": (lambda d: (d / "lowered.json").unlink(), "lowered.json missing"),
    "no seed": (lambda d: (d / "mask_seed").unlink(), "mask_seed missing"),
    "surplus file": (lambda d: (d / "model.bin").write_bytes(b"x"), "model.bin"),
    "short weights": (truncate("weights.safetensors", 0.5), "weights.safetensors: truncated"),
    "empty weights": (truncate("weights.safetensors", 0), "weights.safetensors: truncated"),
    "short structure": (truncate("lowered.json", 0.7), "lowered.json"),
    "short seed": (truncate("mask_seed", 0.5), "mask_seed holds 16 bytes"),
    "open seed": (lambda d: (d / "mask_seed").chmod(0o644), "can be read or written by other users"),
    "other weights": (weights(lambda w: w["h.0.mlp.fused.linear.weight"].add_(1)), "weights have been changed since they were lowered"),
    "missing tensor": (weights(lambda w: w.__delitem__("h.0.mlp.fused.linear.weight")), "mlp.fused.linear.weight: missing"),
    "surplus tensor": (weights(lambda w: w.update(extra=torch.zeros(1))), "extra: surplus"),
    "unknown field": (edit(lambda j: j.update(colour="red")), "colour"),
    "missing field": (edit(lambda j: j.__delitem__("ranges")), "ranges"),
    "wrong type": (edit(lambda j: j.update(headroom="much")), "headroom"),
    "newer version": (edit(lambda j: j["graph"].update(version=3)), "version 3 of the format, and this release reads version 2"),
    "older version": (edit(older), "version 1 of the format, and this release reads version 2; .*`privinf convert`"),
    "other seed": (lambda d: (d / "mask_seed").write_bytes(bytes(32)), "seed of the weights' masks, .* has changed"),
    "other digests": (
        edit(lambda j: [item.update(sha256="0" * 64) for item in j["graph"]["setup"]["items"].values()]),
        "masks, .* has changed",
    ),
    "another digest": (edit(lambda j: largest(j).update(sha256="0" * 64)), "its id would be another"),
    "other tokenizer": (lambda d: (d / "tokenizer.json").write_bytes(b"{}"), "its id would be another"),
    "other template": (edit(lambda j: j["graph"]["info"].update(chat_template="x")), "its id would be another"),
    "misshapen": (edit(lambda j: j["graph"]["nodes"][2]["parameters"].update(weight=[16, 47])), "c_attn"),
    "other heads": (edit(lambda j: j["graph"]["nodes"][3]["attributes"].update(heads=3)), "attention"),
    "unknown node": (edit(lambda j: j["graph"]["nodes"][2].update(op="convolution")), "convolution"),
    "unknown input": (edit(lambda j: j["graph"]["nodes"][2].update(inputs=["nowhere"])), "nowhere"),
    "plan of nothing": (edit(lambda j: j["graph"]["plan"].update(nothing={"bits": 3})), "nothing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, saved: Path) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ConfigError, match=message) as caught:
        load(saved)
    assert caught.value.exit_code == 2


def test_every_flipped_byte_of_the_weights_is_noticed(saved: Path) -> None:
    path = saved / "weights.safetensors"
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), len(data) // 40):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ConfigError):
            load(saved)


def test_no_pickle_is_ever_loaded(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {marker}",))

    torch.save(Evil(), saved / "weights.safetensors")
    with pytest.raises(ConfigError):
        load(saved)
    assert not marker.exists()


# ---- calibration inputs


def test_calibration_inputs_reach_both_edges(lowered: Lowered) -> None:
    inputs = [ids for (ids,) in calibration_ids(lowered.tokenizer, VOCAB, 12)]
    lengths = {ids.shape[1] for ids in inputs}
    assert {1, 12} <= lengths and all(ids.shape[0] == 1 and int(ids.max()) < VOCAB for ids in inputs)
    assert len(text_ids(lowered.tokenizer, VOCAB)) > 500
    assert text_ids(None, VOCAB) == []
    noise = [ids for (ids,) in calibration_ids(None, VOCAB, 200)]
    assert noise[-1].shape == (1, 200) and len(torch.unique(noise[-1])) > 20


def test_calibration_refuses_a_broken_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        text_ids(b"{}", VOCAB)

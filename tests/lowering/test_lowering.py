"""The lowering against PyTorch and against stock CrypTen, and what it must recognise, fold and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privinf.crypten_adapter import Graph, crypten_module
from privinf.graph.info import Info, InputSpec
from privinf.graph.planning import power_of_two
from privinf.lowering import Lowered, convert, lower
from privinf.lowering.calibrate import calibrate
from privinf.lowering.export import lower_graph
from privinf.lowering.rules import check_graph
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import save_checkpoint
from privinf.ops.add import Add
from privinf.ops.attention import CausalAttention
from privinf.ops.linear import Linear
from privinf.ops.matmul import MatMul
from privinf.ops.mul_constant import MulConstant
from privinf.ops.slice import Slice
from privinf.ops.softmax import Softmax
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from protocols.errors import ConfigError, UnsupportedOpError
from tests.support.lowering_modules import CASES, HEADS, POSITIONS, WIDTH, Blocks, NanoGpt, Parts, Temperature
from tests.support.waiting import PATIENCE

FLOAT = 2e-5  # of two float32 evaluations in different order, values of order 1
STOCK = 0.05  # of stock CrypTen: 16 fraction bits, approximate exponential and reciprocal
SIZES: dict[str, Any] = {"vocab_size": 23, "n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 4}


def ops(graph: Graph) -> str:
    return " ".join(node.op for node in graph.nodes)


@cache
def lowered_case(name: str, length: int) -> tuple[nn.Module, Graph]:
    """A case's module and graph, exported once for all tests."""
    torch.manual_seed(length)
    module = CASES[name].module().eval()
    return module, graph_of(module, *CASES[name].inputs(length))


def graph_of(module: nn.Module, *inputs: Tensor) -> Graph:
    with torch.no_grad():
        return lower_graph(module.eval(), inputs)


# ---- the same function


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("name", CASES)
def test_graph_equals_module(name: str, length: int) -> None:
    case, (module, graph) = CASES[name], lowered_case(name, length)
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            inputs = case.inputs(length)
            expected = module(*inputs)
            torch.testing.assert_close(graph(*inputs), expected, rtol=FLOAT, atol=FLOAT * max(1.0, float(expected.abs().max())))
    if case.ops is not None and length > 1:
        assert ops(graph) == case.ops


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("arithmetic", "torch attention", "weights used twice")])
def test_graph_on_stock_crypten(name: str, crypten: Any) -> None:
    module, graph = lowered_case(name, 7)
    inputs = CASES[name].inputs(7)
    private = [crypten.cryptensor(value if value.is_floating_point() else F.one_hot(value, 20).float()) for value in inputs]
    with torch.no_grad():
        found = graph.encrypted_copy()(*private).get_plain_text()
        torch.testing.assert_close(found, module(*inputs), rtol=STOCK, atol=STOCK)
    assert not graph.encrypted


def test_graph_on_two_crypten_parties(tmp_path: Path) -> None:
    """In processes of its own: two parties over loopback, each holding one share of weights and input."""
    script = tmp_path / "two_parties.py"
    script.write_text(
        "import torch\n"
        "from privinf.crypten_adapter import crypten_module\n"
        "from privinf.lowering.export import lower_graph\n"
        "from tests.support.lowering_modules import Temperature, floats\n"
        "import crypten.mpc as mpc\n"
        "crypten = crypten_module()\n"
        "torch.manual_seed(0)\n"
        "module, (x,) = Temperature().eval(), floats(4)\n"
        "with torch.no_grad():\n"
        "    graph, expected = lower_graph(module, (x,)), module(x)\n"
        "@mpc.run_multiprocess(world_size=2)\n"
        "def party():\n"
        "    torch.set_num_threads(1)\n"
        "    return float((graph.encrypted_copy()(crypten.cryptensor(x)).get_plain_text() - expected).abs().max())\n"
        "if __name__ == '__main__':\n"
        "    print(party())\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, str(script)], cwd=root, env=environment(root), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(errors) == 2 and max(errors) < STOCK


def environment(root: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def test_importing_the_package_loads_neither_torch_nor_crypten() -> None:
    code = "import sys, privinf.lowering; assert not {'torch', 'crypten'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=environment(root), timeout=PATIENCE).returncode == 0


# ---- attention as one region


def test_every_way_of_writing_attention_is_recognised() -> None:
    plain = {"bidirectional", "positional bias", "weights used twice", "arithmetic", "tied words", "chain", "gated", "two softmaxes"}
    for name in set(CASES) - plain - {"headwise map", "doubled"}:
        graph = lowered_case(name, 7)[1]
        regions = [node for node in graph.nodes if isinstance(node, CausalAttention)]
        assert regions, name
        assert not any(isinstance(node, Softmax | MatMul) for node in graph.nodes), name
        for region in regions:
            assert region.scale == 1.0 and region.width in (WIDTH, HEADS * region.head_dim), name


@pytest.mark.parametrize("name", ["positional bias", "weights used twice"])
def test_a_causal_softmax_outside_the_region(name: str) -> None:
    graph = lowered_case(name, 7)[1]
    assert [node.causal for node in graph.nodes if isinstance(node, Softmax)] == [True]
    assert sum(isinstance(node, MatMul) for node in graph.nodes) >= 2


def test_constant_scale_goes_into_the_query_columns() -> None:
    module = NanoGpt()
    graph = graph_of(module, torch.randn(1, 5, WIDTH))
    fused, region = graph.nodes[0], graph.nodes[1]
    assert isinstance(region, CausalAttention) and region.scale == 1.0 and not region.parameter_shapes
    weight, bias = module.qkv.weight.t(), module.qkv.bias
    torch.testing.assert_close(fused.value("weight")[:, :WIDTH], weight[:, :WIDTH] / 2)
    torch.testing.assert_close(fused.value("weight")[:, WIDTH:], weight[:, WIDTH:])
    torch.testing.assert_close(fused.value("bias"), torch.cat([bias[:WIDTH] / 2, bias[WIDTH:]]))
    assert (fused.name, region.name) == ("qkv.linear", "attention")


def test_temperature_is_a_private_table_with_the_scale_in_it() -> None:
    module = Temperature()
    region = graph_of(module, torch.randn(1, POSITIONS, WIDTH)).nodes[1]
    torch.testing.assert_close(region.value("inverse_temperature"), 1 / (module.temperature * 2))


def test_a_constant_temperature_keeps_its_place() -> None:
    """The structure is public: it must not show that a private table happens to hold equal numbers."""
    module = Temperature()
    with torch.no_grad():
        module.temperature.fill_(1.0)
    assert graph_of(module, torch.randn(1, 5, WIDTH)).nodes[1].parameter_shapes == {"inverse_temperature": (HEADS, 5)}


def test_separate_maps_are_fused_under_a_joint_name() -> None:
    graph = lowered_case("separate maps, additive mask", 7)[1]
    assert graph.nodes[0].name == "q+k+v.linear" and graph.nodes[0].parameter_shapes == {"weight": (8, 24), "bias": (24,)}


def test_names_and_layers() -> None:
    graph = lowered_case("blocks", 7)[1]
    names = [(node.name, node.layer) for node in graph.nodes]
    assert names[:4] == [("h.0.qkv.linear", "h.0"), ("h.0.attention", "h.0"), ("h.1.qkv.linear", "h.1"), ("h.0.out.linear", "h.0")]
    assert names[-1] == ("head.linear", "")
    assert len({name for name, _ in names}) == len(names)


# ---- what has no protocol


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.h = nn.LogSoftmax(-1), nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for block in self.h:
            x = x + torch.erf(block(x))
        return x.exp() / x


def test_every_unsupported_operator_is_named_at_once() -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        lower(Unsupported(), torch.randn(1, 3, WIDTH))
    for part in (
        "norm (LogSoftmax): aten.log_softmax",
        "h.0.1 (Tanh): aten.tanh",
        "h.1.1 (Tanh): aten.tanh",
        "top (Unsupported): aten.erf",
        "aten.exp",
        "division by a private value",
    ):
        assert part in str(caught.value)
    assert caught.value.exit_code == 5


class Band(Parts):
    def forward(self, x: Tensor) -> Any:
        band = torch.ones(x.shape[1], x.shape[1]).tril().triu(-1) == 0
        return (self.q(x) @ self.k(x).mT).masked_fill(band, -torch.inf).softmax(-1) @ self.v(x)


class MaskWithoutSoftmax(Parts):
    def forward(self, x: Tensor) -> Any:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (self.q(x) @ self.k(x).mT).masked_fill(future, -1e9) @ self.v(x)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x


class IdsAsNumbers(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids * 2.0


class NoInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Band(), "a mask that is not the causal one"),
        (MaskWithoutSoftmax(), "not only read by a softmax"),
        (Random(), "draws random numbers"),
        (Branch(), "cannot trace"),
        (Pair(), "one tensor"),
        (NoInput(), "does not depend on its inputs"),
    ],
)
def test_refusals(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedOpError, match=message):
        lower(module, torch.randn(1, 5, WIDTH))


def test_token_ids_are_no_numbers() -> None:
    with pytest.raises(UnsupportedOpError, match="token ids"):
        lower(IdsAsNumbers(), torch.zeros(1, 3, dtype=torch.long))


def test_example_inputs_must_fit() -> None:
    with pytest.raises(ConfigError, match="does not run on the example inputs"):
        lower(nn.Linear(3, 3), torch.randn(2, 4))
    with pytest.raises(ConfigError, match="tensor"):
        lower(nn.Linear(3, 3), [1.0])


def test_module_keeps_its_mode_and_its_gradients() -> None:
    module = NanoGpt()
    module.drop.eval()
    lower(module, torch.randn(1, 3, WIDTH))
    assert module.training and not module.drop.training
    assert all(parameter.requires_grad for parameter in module.parameters())


# ---- converted checkpoints


def checkpoint(directory: Path, variant: str, **sizes: Any) -> AeroModel:
    """A checkpoint with every parameter moved off its initial value."""
    config = ladder_config(variant, **{**SIZES, **sizes})
    model = AeroModel(config).eval()
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.02)
    save_checkpoint(model, config, directory, torch.float32)
    return model


FIRST = "embedding position_bias linear attention "
NEXT = "joint_linear {} add attention "  # q, k and v of what the stream's own map reads, before that
LAST = "joint_linear {} add last_position attention last_position "
FUSED = (FIRST + NEXT + LAST).format("joint_linear", "joint_linear")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("SM+ScFuFFN", FUSED + "joint_linear"),
        ("SM+ScFFN", FUSED + "joint_linear"),
        ("SM", FUSED + "joint_linear add linear"),
        ("SM(t)+ScFuFFN_i2", (FIRST + NEXT + LAST).format("joint_linear", "linear") + "joint_linear"),
    ],
)
def test_convert(variant: str, expected: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, variant)
    lowered = convert(tmp_path)
    assert ops(lowered.graph) == expected
    for length in (1, 2, 5, 11, 12):
        ids = torch.randint(SIZES["vocab_size"], (1, length))
        with torch.no_grad():
            wanted = model(ids)[:, -1]
        torch.testing.assert_close(lowered.graph(ids), wanted, rtol=FLOAT, atol=FLOAT * max(1.0, float(wanted.abs().max())))
    info = lowered.info
    assert (info.variant, info.layers, info.heads, info.width, info.vocab, info.n_positions) == (variant, 3, 4, 16, 23, 12)
    assert info.inputs == (InputSpec("ids", "ids", (1, None)),) and info.output == (1, 23) and info.is_language_model
    assert any(node.tied_to == "wte.embedding" for node in lowered.graph.nodes[-1:]) == (variant == "SM")
    temperature = "inverse_temperature" in lowered.graph.node("h.0.attn.attention").parameter_shapes
    assert temperature == ("(t)" in variant)


def test_convert_a_model_of_one_position(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "SM(t)+ScFuFFN", n_positions=1)
    lowered = convert(tmp_path)
    assert ops(lowered.graph).startswith(FIRST)
    ids = torch.tensor([[5]])
    with torch.no_grad():
        torch.testing.assert_close(lowered.graph(ids), model(ids)[:, -1], rtol=FLOAT, atol=FLOAT)


# ---- ranges


def test_ranges_hold_what_was_seen() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    module = NanoGpt().eval()
    graph = graph_of(module, x)
    ranges = calibrate(graph, [(x,)], headroom=1.0)
    with torch.no_grad():
        q, k, v = module.split(x)
        expected = {"q": q / 2, "k": k, "v": v, "score": (q @ k.mT / 2).tril(), "out": graph.node("attention")(graph.node("qkv.linear")(x))}
    for part, value in expected.items():
        peak = float(value.abs().max())
        assert peak * (1 - 1e-6) <= ranges["attention"][part] < 2 * peak, part
    assert ranges["x"]["out"] == power_of_two(float(x.abs().max()))
    wide = calibrate(graph, [(x,)], headroom=4.0)
    assert all(wide["attention"][part] == 4 * ranges["attention"][part] for part in expected)
    assert abs(ranges["attention"]["score_seen"] - float(expected["score"].abs().max())) < 1e-5


@pytest.mark.parametrize(("value", "power"), [(1.0, 1.0), (1.01, 2.0), (0.3, 0.5), (0.0, 2**-10), (1000.0, 1024.0), (4.0, 4.0)])
def test_power_of_two(value: float, power: float) -> None:
    assert power_of_two(value) == power


def test_ranges_refuse_what_is_not_finite() -> None:
    graph = graph_of(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="not finite"):
        calibrate(graph, [(torch.full((1, 2), torch.inf),)])
    with pytest.raises(ConfigError, match="headroom"):
        calibrate(graph, [(torch.zeros(1, 2),)], headroom=0.5)


# ---- the rules


def small(*nodes: tuple[Any, list[str]], output: str = "b", shape: tuple[int, ...] = (1, 3)) -> tuple[Graph, Info]:
    graph = Graph(["x"], [output])
    for node, inputs in nodes:
        graph.append(node, inputs)
    return graph, Info(variant="module", inputs=(InputSpec("x", "float", (1, 2)),), output=shape)


A, B = Linear("a", weight=(2, 3)), Add("b")


@pytest.mark.parametrize(
    ("graph", "rule"),
    [
        (small((A, ["x"]), (B, ["a", "later"])), "inputs come before their readers"),
        (small((A, ["x"]), (B, ["a"])), "number of inputs"),
        (small((A, ["x"]), (B, ["a", "a"]), output="c"), "one output"),
        (small((A, ["x"]), (MulConstant("c", constant=2.0), ["a"]), (B, ["a", "a"])), "every node is needed"),
        (small((A, ["x"]), (B, ["a", "a"]), shape=(1, 4)), "shapes fit"),
        (small((Linear("a", weight=(5, 3)), ["x"]), (B, ["a", "a"])), "shapes fit"),
        (small((Slice("a", dim=1, start=0, stop=9), ["x"]), (B, ["a", "a"])), "shapes fit"),
        (small((Linear("a b", weight=(2, 3)), ["x"]), (B, ["a b", "a b"])), "names"),
        (small((MulConstant("a", constant=float("inf")), ["x"]), (B, ["a", "a"])), "constants are finite"),
        (small((Linear("a", weight=(2, 2**40)), ["x"]), (B, ["a", "a"])), "ranks and sizes"),
        (small((Linear("a", weight=(2, 3), tied_to="x"), ["x"]), (B, ["a", "a"])), "tied weights"),
    ],
)
def test_rules(graph: tuple[Graph, Info], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check_graph(*graph)


def test_a_valid_graph_passes() -> None:
    check_graph(*small((A, ["x"]), (B, ["a", "a"])))


def test_lower_returns_a_complete_model() -> None:
    lowered = lower(Blocks(), torch.randn(1, 5, WIDTH))
    assert isinstance(lowered, Lowered) and isinstance(lowered.graph, crypten_module().nn.Graph)
    assert lowered.info.inputs == (InputSpec("x", "float", (1, 5, WIDTH)),) and lowered.info.output == (1, 5)
    assert len(lowered.id) == 64 and lowered.mask_seed is not None and len(lowered.mask_seed) == 32
    other = lower(Blocks(), torch.randn(1, 5, WIDTH))
    assert other.id != lowered.id and other.mask_seed != lowered.mask_seed

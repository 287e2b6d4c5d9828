"""Checks inside a ComfyUI (see inside.py): every node of the host that makes a MODEL of a MODEL, on our model.

The law: each of them gives a finite picture, or an error that names what is wrong, and leaves the MODEL it was given
alone. The nodes are found by what they take, those of later hosts too; what is known of them stands in three sets.
"""

from __future__ import annotations

import asyncio

from host_process import encode, loaded, stock
from inside_sampling import CFG, SEED, result, setting
from inside_weights import layers, lora, subject, with_lora

import torch  # isort: skip


GIVEN = {"MODEL", "CONDITIONING", "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SAME = 1e-4  # differences below this are those of rounding: a condition evaluated once more, a compiler

CHANGES_THE_PICTURE = {
    # guidance
    "APG", "CFGNorm", "CFGOverride", "CFGZeroStar", "Epsilon Scaling", "Mahiro", "PerpNeg", "RenormCFG", "RescaleCFG",
    "TCFG", "TemporalScoreRescaling", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance",
    # shifts of a flow's times
    "ModelSamplingAuraFlow", "ModelSamplingFlux", "ModelSamplingLTXV",
    # weights and steps
    "LazyCache", "ModelMergeAdd", "ModelMergeSubtract",
}  # fmt: skip
BY_OTHER_VALUES = {"FreSca", "ModelComputeDtype", "ModelMergeBlocks", "ModelMergeSimple", "ModelNoiseScale"}
FAILS = {  # node -> a word of its error
    # The host asks the model's configuration for a fact that UNets alone have.
    "FreeU": "model_channels", "FreeU_V2": "model_channels",
    # Our sentence: the sampling of models that are no flows.
    "ModelSamplingContinuousEDM": "take out", "ModelSamplingContinuousV": "take out",
    "ModelSamplingDiscrete": "take out", "ModelSamplingStableCascade": "take out",
    # Our sentence: times that run to 1000.
    "ModelSamplingSD3": "use ModelSamplingAuraFlow", "MiniMaxH3SigmaShift": "use ModelSamplingAuraFlow",
}  # fmt: skip


def every_node() -> dict:
    """Those of the host itself that take and give a MODEL. Its extra nodes are loaded when they are first asked for."""
    if "RescaleCFG" not in stock.NODE_CLASS_MAPPINGS:
        asyncio.run(stock.init_builtin_extra_nodes())
    own = {
        name: node
        for name, node in stock.NODE_CLASS_MAPPINGS.items()
        if not getattr(node, "RELATIVE_PYTHON_MODULE", "nodes").startswith("custom_nodes")
    }
    return {n: node for n, node in own.items() if "MODEL" in node.RETURN_TYPES and "MODEL" in kinds(node).values()}


def inputs(node) -> dict:
    """The required ones: name -> (kind, or a list of options; facts)."""
    return {name: (*entry, {})[:2] for name, entry in node.INPUT_TYPES().get("required", {}).items()}


def kinds(node) -> dict[str, str]:
    return {
        name: "COMBO" if isinstance(kind, list) else str(getattr(kind, "value", kind))
        for name, (kind, _) in inputs(node).items()
    }


def asks_for_more(node) -> list[str]:
    """What it needs beside models, conditions and widgets. A file's name is no widget: the file is something more."""
    return [
        f"{name} ({kind})"
        for name, kind in kinds(node).items()
        if kind not in GIVEN or (kind == "COMBO" and name.endswith("_name"))
    ]


def default(name: str, kind, facts: dict):
    options = kind if isinstance(kind, list) else facts.get("options")
    if name == "backend":
        return "eager"  # of a compiler: the network is traced as for any other, and nothing is built
    return facts["default"] if "default" in facts else options[0]


def other_value(name: str, kind, facts: dict):
    """Off the default: half way to an end of a number's range, but never far; the last option; other layers."""
    value, options = default(name, kind, facts), kind if isinstance(kind, list) else facts.get("options")
    if name.endswith("_percent") or name == "backend":
        return value
    if options:
        return options[-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        low, high = max(facts.get("min", 0.0), value - 1), min(facts.get("max", value + 1), value + 1)
        return (value + (high if high > value else low)) / 2
    return "0, 1" if value == "7, 8, 9" else value


def applied(it, node, choose=default):
    """The node's MODEL: of ours and another, with a third condition and such values."""
    models, of_kind = iter(it.models), kinds(node)
    values = {}
    for name, (kind, facts) in inputs(node).items():
        given = {"MODEL": lambda: next(models), "CONDITIONING": lambda: it.third}.get(of_kind[name])
        values[name] = choose(name, kind, facts) if given is None else given()
    call = getattr(node if hasattr(node, "define_schema") else node(), node.FUNCTION)
    return result(call(**values))[list(node.RETURN_TYPES).index("MODEL")]


def another(model):
    """The same model with weights of its own, for merges."""
    torch.manual_seed(0)
    weights = {key: value for key, value in model.model.state_dict().items() if value.dim() > 1}
    clone = model.clone()
    clone.add_patches({key: ("diff", (0.1 * torch.randn_like(value),)) for key, value in weights.items()}, 1.0)
    return clone


def draw(it, model, steps=3) -> torch.Tensor:
    return stock.common_ksampler(model, SEED, steps, CFG, "euler", "simple", it.red, it.none, it.latent)[0]["samples"]


def outcome(it, node, own) -> tuple[str, Exception | None]:
    """("changes the picture", "changes it by other values", "no effect", "not finite" or "fails"; its error)."""
    for choose in (default, other_value):
        try:
            got = draw(it, applied(it, node, choose))
        except Exception as error:
            if choose is default:
                return "fails", error
            return "no effect", error
        if not got.isfinite().all():
            return "not finite", None
        if (got - own).abs().max() > SAME:
            return "changes the picture" if choose is default else "changes it by other values", None
    return "no effect", None


def check_every_stock_node_that_makes_a_model_of_a_model(pack):
    it = setting(pack)
    it.models, own = (it.model, another(it.model)), draw(it, it.model)
    it.third = encode(loaded(pack)[1], "apple")
    assert (draw(it, it.models[1]) - own).abs().max() > 0.1
    table, nodes = {}, every_node()
    for name, node in nodes.items():
        more = asks_for_more(node)
        table[name] = (f"asks for {', '.join(more)}", None) if more else outcome(it, node, own)
        assert torch.equal(draw(it, it.model), own), f"{name} changed the model it was given"
    for name, (what, error) in table.items():
        print("STOCK", name, "|", what, "|", "" if error is None else f"{type(error).__name__}: {error}")
    assert {"RescaleCFG", "TorchCompileModel", "FreeU"} <= table.keys()
    known = {
        **dict.fromkeys(CHANGES_THE_PICTURE, "changes the picture"), **dict.fromkeys(FAILS, "fails"),
        **dict.fromkeys(BY_OTHER_VALUES, "changes it by other values"),
    }  # fmt: skip
    wrong = {name: table[name] for name, what in known.items() if name in table and table[name][0] != what}
    assert not wrong, wrong
    for name, (what, error) in table.items():
        assert what != "not finite", name
        if what == "fails":
            assert FAILS.get(name, "") in str(error) and (name in FAILS or sentence(error)), (name, error)


def sentence(error: Exception) -> bool:
    """Ours, which says what to do."""
    return isinstance(error, ValueError) and "expected" in str(error)


def check_caches_of_steps_are_felt_and_gone_with_the_run(pack):
    """EasyCache and LazyCache leave evaluations out; the next run without them is as before."""
    it, nodes = setting(pack), every_node()
    before = draw(it, it.model, 20)
    for name in ("EasyCache", "LazyCache"):
        if name in nodes:
            for threshold in (0.0, 3.0):
                cached = result(nodes[name].execute(it.model, threshold, 0.15, 0.95, False))[0]
                got = draw(it, cached, 20)
                assert got.isfinite().all() and (threshold > 0) == bool((got - before).abs().max() > SAME), name
            assert torch.equal(draw(it, it.model, 20), before), name


def check_a_bypass_lora_equals_a_lora(pack):
    """Of newer hosts: a LoRA that is computed beside each layer instead of in its weight."""
    node = every_node().get("LoraLoaderBypassModelOnly")
    if node is None:
        return
    it = setting(pack)
    own, weights = draw(it, it.model), subject(pack)
    for layer, names in layers(weights.state).items():
        file, _ = lora(weights, names)
        want = draw(it, with_lora(it.model, file))
        got = draw(it, node().load_lora_model_only(it.model, "some.safetensors", 1.0)[0])
        assert (got - want).abs().max() < 1e-3 * want.abs().max(), (layer, (got - want).abs().max())
        assert (want - own).abs().max() > 1e-3, layer
    assert torch.equal(draw(it, it.model), own)

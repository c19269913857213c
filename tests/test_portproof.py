"""A port is proved equal, a planted mistake is named where it is, and bad input is one line."""

import dataclasses
import functools
import importlib
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

import portproof
from portproof import leaves, report, taps, torch_side
from portproof.page import page
from portproof.port import Pass
from tests.tiny import ROOT

slow = pytest.mark.slow
V, D, L, DEPTH = 29, 6, 5, 3


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(D, D)

    def forward(self, x_BxLxD):
        h_BxLxD = F.dropout(torch.tanh(self.fc(x_BxLxD)), 0.3, self.training)
        return x_BxLxD + h_BxLxD


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, D)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = torch.nn.Linear(D, V, bias=False)

    def forward(self, tokens_BxL):
        x_BxLxD = self.embed(tokens_BxL)
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD)
        return self.head(x_BxLxD)


def tiny(
    params,
    tokens_BxL,
    key,
    deterministic,
    rate=0.3,
    keep=0.7,
    fc=jnp.matmul,
    split=jax.random.split,
):
    """The same, scanned."""

    def block(x_BxLxD, layer):
        kernel_DxD, bias_D, key = layer
        h_BxLxD = portproof.tap("tanh", jnp.tanh(fc(x_BxLxD, kernel_DxD) + bias_D))
        if not deterministic:
            kept = portproof.mask("kept", jax.random.bernoulli(key, keep, h_BxLxD.shape))
            h_BxLxD = jnp.where(kept, h_BxLxD / (1 - rate), 0)
        return portproof.tap("block", x_BxLxD + h_BxLxD), None

    x_BxLxD = portproof.tap("embedding", params["embed"][tokens_BxL])
    layers = params["kernel"], params["bias"], split(key, DEPTH)
    x_BxLxD, _ = jax.lax.scan(block, x_BxLxD, layers)
    return x_BxLxD @ params["head"]


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PORT = portproof.Port(
    torch_model=Tiny,
    jax_model=tiny,
    params={
        "embed": shape(V, D),
        "kernel": shape(DEPTH, D, D),
        "bias": shape(DEPTH, D),
        "head": shape(D, V),
    },
    leaves=[
        ("embed.weight", "embed"),
        ("blocks.{i}.fc.weight", "kernel.T"),
        ("blocks.{i}.fc.bias", "bias"),
        ("head.weight", "head.T"),
    ],
    taps=[
        ("embedding", "embed", "embedding"),
        ("block {i}: tanh", "blocks.{i}>tanh", "tanh"),
        ("block {i}", "blocks.{i}", "block"),
    ],
    masks=[("blocks.{i}", "kept")],
    batch=portproof.tokens(40, L, vocab=V),
    optimizers=(
        optax.adamw(1e-3, weight_decay=0.01),
        lambda module: torch.optim.AdamW(module.parameters(), 1e-3),
    ),
)


def changed(**fields):
    return dataclasses.replace(PORT, **fields)


def with_model(**changes):
    return changed(jax_model=functools.partial(tiny, **changes))


# ---- what is equal, and what is not -------------------------------------------------------------


def test_equal_models_are_proved_equal():
    proved = portproof.prove(PORT)
    assert proved.passed, proved
    rungs = {row.rung[0] for row in proved.rows}
    assert rungs == set("12345678")
    assert str(proved).endswith("equal at every place")


def rounded(x, kernel):
    return (x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).astype(x.dtype)


def bfloat16_in_float32(x, kernel):
    return (rounded if x.dtype == jnp.float32 else jnp.matmul)(x, kernel)


@jax.custom_vjp
def doubled(x, kernel):
    return x @ kernel


doubled.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda saved, g: jax.vjp(jnp.matmul, *saved)[1](2 * g),
)


def exchanged(x_BxLxD, kernel_DxD):
    return x_BxLxD @ kernel_DxD.T


def not_a_number(x_BxLxD, kernel_DxD):
    return x_BxLxD @ kernel_DxD * jnp.nan


@pytest.mark.parametrize(
    ("changes", "rung", "culprit"),
    [
        ({"fc": exchanged}, "2 taps forward", "block 0: tanh"),
        ({"fc": not_a_number}, "2 taps forward", "block 0: tanh"),
        ({"fc": doubled}, "4 taps backward", "what uses block 1, backward"),
        ({"rate": 0.4}, "7 train mode, forward", "block 0"),
        ({"rate": 0.4, "keep": 0.6}, "7 train mode, forward", "block 0"),
        ({"keep": 0.6}, "7 dropout, shares", "JAX at blocks.0"),
        ({"split": lambda key, n: jnp.stack([key] * n)}, "7 dropout, shares", "JAX at blocks.0"),
        (
            {"split": lambda key, n: jax.random.split(jax.random.key(0), n)},
            "7 dropout, shares",
            "JAX at blocks.0",
        ),
    ],
)
def test_the_first_place_that_differs_is_the_planted_one(changes, rung, culprit):
    proved = portproof.prove(with_model(**changes), float32=False)
    assert (proved.first.rung, proved.first.culprit) == (rung, culprit), proved


def test_a_gradient_that_pytorch_stops_is_named_where_it_stops(monkeypatch):
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: tanh(x.detach()))
    proved = portproof.prove(PORT, float32=False)
    assert proved.first.culprit == "what uses block 1, backward", proved


def test_a_mask_that_is_one_for_all_positions_is_seen(monkeypatch):
    bernoulli = jax.random.bernoulli

    def one_for_all(key, keep, shape):
        return jnp.broadcast_to(bernoulli(key, keep, (shape[0], 1, shape[2])), shape)

    monkeypatch.setattr(jax.random, "bernoulli", one_for_all)
    proved = portproof.prove(PORT, float32=False)
    assert "the same mask as along axis 1" in str(proved.first), proved


def of_layers(make, function, params, leaves, **fields):
    """A port of `Sequential(*make())` on 16 vectors, all of whose numbers are above 0."""
    losses = (lambda y_BxD, x_BxD: (y_BxD**2).mean(),) * 2
    batch = np.random.default_rng(2).uniform(0.5, 1.5, (16, D))
    plain = {"taps": [], "masks": [], "batch": batch, "losses": losses} | fields
    model = lambda: torch.nn.Sequential(*make())  # noqa: E731
    return changed(torch_model=model, jax_model=function, params=params, leaves=leaves, **plain)


TWO = {"a": shape(D, 5), "a_bias": shape(5), "b": shape(5, 3), "b_bias": shape(3)}
OF_TWO = [("0.weight", "a.T"), ("0.bias", "a_bias"), ("2.weight", "b.T"), ("2.bias", "b_bias")]


def two_layers(between):
    def function(params, x_BxD, key, deterministic):
        h_Bx5 = between(x_BxD @ params["a"] + params["a_bias"], params, deterministic)
        return h_Bx5 @ params["b"] + params["b_bias"]

    return function


@pytest.mark.parametrize(
    ("between", "is_equal"), [(jax.nn.relu, True), (jax.nn.silu, False), (lambda x: x, False)]
)
def test_units_of_either_sign_are_compared(between, is_equal):
    """Of weights around 0.1 and 400 inputs above 0 all would be above 0, and ReLU the identity."""
    make = lambda: (torch.nn.Linear(400, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))  # noqa: E731
    params = TWO | {"a": shape(400, 5)}
    batch = np.random.default_rng(2).uniform(0.5, 1.5, (16, 400))
    port = of_layers(make, two_layers(lambda h, *_: between(h)), params, OF_TWO, batch=batch)
    assert portproof.prove(port, float32=False).passed == is_equal


def test_train_mode_is_compared_without_dropout_too():
    """Batch norm; in train mode the gradient of a bias before it is 0."""

    def norm(h_Bx5, params, uses_running):
        mean, var = (0.0, 1.0) if uses_running else (h_Bx5.mean(0), h_Bx5.var(0))
        return (h_Bx5 - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["shift"]

    make = lambda: (  # noqa: E731
        torch.nn.Linear(D, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.Linear(5, 3),
    )
    params = TWO | {"scale": shape(5), "shift": shape(5)}
    rows = [*OF_TWO, ("1.weight", "scale"), ("1.bias", "shift")]
    port = of_layers(make, two_layers(norm), params, rows)
    proved = portproof.prove(port, float32=False)
    assert proved.passed, proved
    never = two_layers(lambda h, params, _: norm(h, params, True))
    proved = portproof.prove(dataclasses.replace(port, jax_model=never), float32=False)
    assert proved.first.rung == "7 train mode, forward", proved


def test_every_call_of_a_tap_is_compared():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = torch.nn.Linear(D, D, bias=False)

        def forward(self, x_BxD):
            return self.cell(torch.tanh(self.cell(x_BxD)))

    def function(params, x_BxD, key, deterministic, second=lambda kernel: kernel):
        x_BxD = portproof.tap("cell", x_BxD @ params["cell"])
        return portproof.tap("cell", jnp.tanh(x_BxD) @ second(params["cell"]))

    fields = {"taps": [("cell", "0.cell", "cell")]}
    params, rows = {"cell": shape(D, D)}, [("0.cell.weight", "cell.T")]
    port = of_layers(lambda: (Outer(),), function, params, rows, **fields)
    assert portproof.prove(port, float32=False).passed
    wrong = functools.partial(function, second=jnp.transpose)
    proved = portproof.prove(dataclasses.replace(port, jax_model=wrong), float32=False)
    assert proved.first.culprit == "cell", proved


def unrolled(params, tokens_BxL, key, deterministic, after=lambda i, x: x, n_masks=1):
    """`tiny` in a loop of Python's; of the masks of a layer the last is that of tanh."""
    x_BxLxD = portproof.tap("embedding", params["embed"][tokens_BxL])
    for i, keys in enumerate(jax.random.split(key, (DEPTH, n_masks))):
        h_BxLxD = jnp.tanh(x_BxLxD @ params["kernel"][i] + params["bias"][i])
        h_BxLxD = portproof.tap("tanh", h_BxLxD)
        for own in [] if deterministic else keys:
            kept = portproof.mask("kept", jax.random.bernoulli(own, 0.7, h_BxLxD.shape))
        h_BxLxD = h_BxLxD if deterministic else jnp.where(kept, h_BxLxD / 0.7, 0)
        x_BxLxD = after(i, portproof.tap("block", x_BxLxD + h_BxLxD))
    return x_BxLxD @ params["head"]


def test_a_tap_in_a_loop_of_layers_whose_gradient_is_stopped():
    assert portproof.prove(changed(jax_model=unrolled), float32=False).passed

    def stop(i, x_BxLxD):
        return jax.lax.stop_gradient(x_BxLxD) if i == 1 else x_BxLxD

    stopped = functools.partial(unrolled, after=stop)
    proved = portproof.prove(changed(jax_model=stopped), float32=False)
    assert proved.first.culprit == "what uses block 1, backward", proved


def test_what_drops_of_nothing_is_no_error(monkeypatch):
    def forward(self, x_BxLxD):
        nothing = F.dropout(0 * x_BxLxD, 0.3, self.training)
        return x_BxLxD + nothing + F.dropout(torch.tanh(self.fc(x_BxLxD)), 0.3, self.training)

    monkeypatch.setattr(Block, "forward", forward)
    port = changed(jax_model=functools.partial(unrolled, n_masks=2))
    proved = portproof.prove(port, float32=False)
    assert proved.passed, proved


def test_a_model_that_works_in_its_batch_has_a_new_one_each_time():
    losses = (lambda logits, batch: (logits**2).mean(),) * 2
    port = changed(
        batch={"tokens": PORT.batch},
        jax_model=lambda params, batch, *how: tiny(params, batch["tokens"], *how),
        forward=lambda model, batch: model(batch.pop("tokens")),
        losses=losses,
    )
    proved = portproof.prove(port, float32=False)
    assert proved.passed, proved


def test_rows_that_share_a_place_are_all_compared():
    proved = portproof.prove(changed(taps=[("wrong", "embed", "tanh"), *TAPS]), float32=False)
    assert proved.first.place == "wrong", proved


def test_float32_sees_one_side_that_computes_in_bfloat16():
    proved = portproof.prove(with_model(fc=bfloat16_in_float32))
    assert (proved.first.dtype, proved.first.culprit) == ("float32", "block 0: tanh"), proved


def test_a_wrong_update_is_seen():
    wrong = optax.adam(1e-3), PORT.optimizers[1]
    proved = portproof.prove(changed(optimizers=wrong), float32=False)
    assert proved.first.rung == "6 updates"
    assert proved.first.place.endswith("moved by 1")


@pytest.mark.parametrize("doing", ["forward", "backward", "update"])
def test_a_model_that_raises_is_a_verdict(doing, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no such thing")

    port = PORT
    if doing == "forward":
        monkeypatch.setattr(Block, "forward", fails)
    elif doing == "backward":
        raises = jax.custom_vjp(jnp.matmul)
        raises.defvjp(lambda x, kernel: (x @ kernel, None), fails)
        port = with_model(fc=raises)
    else:
        port = changed(optimizers=(optax.stateless(fails), PORT.optimizers[1]))
    assert ends(port, monkeypatch) == 1
    side = "PyTorch, forward, blocks.0" if doing == "forward" else f"JAX, {doing}"
    assert f"stopped in {side}: RuntimeError: no such thing" in capsys.readouterr().out


def test_nan_and_another_shape_differ():
    assert report.relative(np.zeros(3), np.zeros(4)) == np.inf
    row = report.Row("2 taps forward", "float64", "x", np.nan, 1.0)
    assert not row.passed
    for wrong in ([np.nan, 1e-7], [1e-7, np.inf]):
        law = report.own_rounding(np.array([wrong, [1e-7, 1e-7]]))
        assert [error <= tolerance for error, tolerance in law] == [False, True]


# ---- models that are written otherwise ----------------------------------------------------------


class Named(NamedTuple):
    x: torch.Tensor


class Inner(torch.nn.Module):
    """Has a buffer that train mode moves, and a named result."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        result = Named(x * self.scale)
        if self.training:
            self.scale = 2 * self.scale
        return result


class Otherwise(Tiny):
    """Drops twice by one module, the second time in place."""

    def __init__(self):
        super().__init__()
        self.drop, self.inner = torch.nn.Dropout(0.2), Inner()

    def forward(self, tokens_BxL):
        x_BxLxD = self.inner(self.drop(self.embed(tokens_BxL))).x
        h_BxLxD = self.blocks[0].fc(x_BxLxD)
        F.dropout(h_BxLxD, 0.3, self.training, inplace=True)
        return self.head(self.drop(x_BxLxD + torch.tanh(h_BxLxD)))


def otherwise(params, tokens_BxL, key, deterministic):
    keys = iter(jax.random.split(key, 3))

    def drop(name, x, rate):
        if deterministic:
            return x
        kept = portproof.mask(name, jax.random.bernoulli(next(keys), 1 - rate, x.shape))
        return jnp.where(kept, x / (1 - rate), 0)

    x_BxLxD = drop("first", params["embed"][tokens_BxL], 0.2)
    fc = params["fc"]
    h_BxLxD = drop("middle", x_BxLxD @ fc["value"] + fc["bias"], 0.3)
    return drop("last", x_BxLxD + jnp.tanh(h_BxLxD), 0.2) @ params["head"]


def test_a_model_that_is_written_otherwise_is_proved_equal():
    """It is made once, and given twice."""
    ready = Otherwise()
    ready.blocks = ready.blocks[:1]
    port = changed(
        torch_model=lambda: ready,
        jax_model=otherwise,
        params={
            "embed": shape(V, D),
            "fc": {"value": shape(D, D), "bias": shape(D)},
            "head": shape(D, V),
        },
        leaves=[
            ("embed.weight", "embed"),
            ("blocks.0.fc.weight", "fc/value.T"),
            ("blocks.0.fc.bias", "fc/bias"),
            ("head.weight", "head.T"),
        ],
        taps=[],
        masks=[("drop", "first"), ("", "middle"), ("drop", "last")],
    )
    proved = portproof.prove(port)
    assert proved.passed, proved
    assert any(row.place == "JAX at drop" for row in proved.rows)


class Attends(torch.nn.Module):
    """PyTorch's own attention, which calls functions that drop."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False)
        self.attn = torch.nn.MultiheadAttention(D, 2, dropout=0.2, batch_first=True)

    def forward(self, tokens_BxL):
        x_BxLxD = self.embed(tokens_BxL)
        hides_LxL = torch.ones(L, L, dtype=torch.bool).triu(1)
        y_BxLxD, _ = self.attn(*[x_BxLxD] * 3, attn_mask=hides_LxL, need_weights=False)
        return self.head(x_BxLxD + y_BxLxD)


def attends(params, tokens_BxL, key, deterministic):
    x_BxLxD = params["embed"][tokens_BxL]
    parts = jnp.split(x_BxLxD @ params["qkv"] + params["qkv_bias"], 3, axis=-1)
    q, k, v = (part.reshape(*part.shape[:2], 2, D // 2).swapaxes(1, 2) for part in parts)
    scores = q @ k.mT / (D // 2) ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(L, dtype=bool), scores, -jnp.inf))
    if not deterministic:
        kept = portproof.mask("weights", jax.random.bernoulli(key, 0.8, weights.shape))
        weights = jnp.where(kept, weights / 0.8, 0)
    y_BxLxD = (weights @ v).swapaxes(1, 2).reshape(x_BxLxD.shape)
    return (x_BxLxD + y_BxLxD @ params["out"] + params["out_bias"]) @ params["head"]


def test_pytorchs_own_attention_drops_by_jaxs_masks():
    port = changed(
        torch_model=Attends,
        jax_model=attends,
        params={
            "embed": shape(V, D),
            "qkv": shape(D, 3 * D),
            "qkv_bias": shape(3 * D),
            "out": shape(D, D),
            "out_bias": shape(D),
            "head": shape(D, V),
        },
        leaves=[
            ("embed.weight", "embed"),
            ("attn.in_proj_weight", "qkv.T"),
            ("attn.in_proj_bias", "qkv_bias"),
            ("attn.out_proj.weight", "out.T"),
            ("attn.out_proj.bias", "out_bias"),
            ("head.weight", "head.T"),
        ],
        taps=[],
        masks=[("attn", "weights")],
    )
    proved = portproof.prove(port)
    assert proved.passed, proved
    assert any(row.rung == "7 train mode, gradients" for row in proved.rows)


def test_what_a_mask_hides_is_equal_and_hides_nothing():
    for hidden in (-np.inf, -1e30):
        assert report.relative([hidden, 1.0], [hidden, 1.0]) == 0
        assert report.relative([hidden, 1.1], [hidden, 1.0]) > 0.05
    with np.errstate(invalid="ignore"):
        assert not report.relative([np.inf, 1.0], [-np.inf, 1.0]) <= 1


def test_which_side_drops_alone_is_said(monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda self, x: x + torch.tanh(self.fc(x)))

    def alone(params, tokens_BxL, key, deterministic):
        result = tiny(params, tokens_BxL, key, deterministic=True)
        return result if deterministic else result * jax.random.uniform(key)

    port = changed(jax_model=alone, masks=[])
    proved = portproof.prove(port, float32=False)
    assert proved.first.place == "JAX in train mode varies", proved


# ---- bad input ----------------------------------------------------------------------------------


def ends(port, monkeypatch, *options):
    """The exit code of a program that proves it."""
    monkeypatch.setattr(sys, "argv", ["port.py", "--dtype", "float64", *options])
    with pytest.raises(SystemExit) as ended:
        portproof.main(lambda: port)
    return ended.value.code


def test_the_command_writes_the_page(monkeypatch, tmp_path):
    assert ends(PORT, monkeypatch, "--html", str(tmp_path / "page.html")) == 0
    assert "equal at every place" in (tmp_path / "page.html").read_text()


def draws(params, tokens, key, deterministic):
    return tiny(params, tokens, key, deterministic=False)


class Noisy(Tiny):
    def forward(self, tokens):
        return super().forward(tokens) * torch.rand(())


class Complex(Tiny):
    def __init__(self):
        super().__init__()
        self.phase = torch.nn.Parameter(torch.ones(D, dtype=torch.cfloat))


class DropsOtherwise(Tiny):
    def forward(self, tokens):
        return F.alpha_dropout(super().forward(tokens), 0.1, self.training)


LEAVES, TAPS = list(PORT.leaves), list(PORT.taps)
BAD = {
    "a leaf that is missing": (
        {"leaves": [*LEAVES[:2], ("blocks.{i}.fc.bais", "bias"), ("head.weight", "had.T")]},
        "blocks.{i}.fc.bais (nearest: blocks.",
    ),
    "all leaves at once": (
        {"leaves": [*LEAVES[:1], ("blocks.{i}.fc.bais", "bias"), ("head.weight", "had.T")]},
        "JAX's had (nearest: head",
    ),
    "a shape": ({"leaves": [*LEAVES[:3], ("head.weight", "head")]}, "head.weight [29, 6]"),
    "a stack": (
        {"params": PORT.params | {"bias": shape(2, D)}},
        "blocks.2.fc.bias [6] and JAX's bias [2, 6]",
    ),
    "a longer stack": (
        {"params": PORT.params | {"bias": shape(DEPTH + 1, D)}},
        "JAX's bias has layers that PyTorch lacks",
    ),
    "a tap of PyTorch": (
        {"taps": [*TAPS, ("x", "blocks.0.fd", "block")]},
        "PyTorch's taps that fire never, or unevenly: blocks.0.fd (nearest: blocks.0.fc",
    ),
    "a tap of JAX": ({"taps": [*TAPS, ("x", "head", "tahn")]}, "unevenly: tahn (nearest: tanh"),
    "a tap that fires less": (
        {"taps": [*TAPS, ("{i}", "blocks.{i}", "embedding")]},
        "unevenly: embedding, called 1 times for 3 layers",
    ),
    "logits that are no array": (
        {"forward": lambda model, tokens: (model(tokens),)},
        "PyTorch's logits are tuple with float64 weights",
    ),
    "a mask": (
        {"masks": [("blocks.{i}", "keeps")]},
        "JAX's masks that fire never, or unevenly: keeps",
    ),
    "no masks": (
        {"masks": []},
        "PyTorch drops at blocks.0, blocks.1, blocks.2, masks are of no place",
    ),
    "a row of another length": (
        {"taps": [("embedding", "embed")]},
        "('embedding', 'embed'): a row of 3 fields; mend the table",
    ),
    "a tap that fires unevenly": (
        {"jax_model": lambda *inputs: portproof.tap("tanh", tiny(*inputs))},
        "JAX's taps that fire never, or unevenly: tanh",
    ),
    "a module that draws otherwise": (
        {"torch_model": DropsOtherwise},
        "PyTorch draws in train mode by other than F.dropout",
    ),
    "a complex parameter": ({"torch_model": Complex}, "PyTorch's phase is not real; split"),
    "a batch of words": ({"batch": {"names": ["a", "b"]}}, "the batch holds <U1; give"),
    "a root of what is below 0": (
        {
            "jax_model": functools.partial(tiny, fc=lambda x, kernel: x @ jnp.sqrt(kernel)),
            "forward": lambda model, tokens: model(tokens) * torch.nan,
        },
        "no loss is finite with weights of N(0, 0.2); use exp of",
    ),
    "randomness in JAX": ({"jax_model": draws}, "JAX's two runs in eval mode differ"),
    "randomness in PyTorch": ({"torch_model": Noisy}, "PyTorch's two runs in eval mode differ"),
    "float32 in JAX": (
        {"jax_model": functools.partial(tiny, fc=rounded)},
        "JAX rounds float64 to bfloat16 at test_portproof.py:",
    ),
    "float32 in PyTorch": (
        {"forward": lambda model, tokens: model(tokens).half()},
        "PyTorch's logits are torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, monkeypatch, capsys):
    fields, words = BAD[case]
    assert ends(changed(**fields), monkeypatch) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--steps", "0"], "argument --steps: 0 is no update"),
        (["--dtype", "y"], "argument --dtype: invalid choice: 'y' (choose from "),
        (["--fault", "z"], "argument --fault: invalid choice: 'z'"),
        (["--html", "/none/page.html"], "--html /none/page.html: no such folder; make it"),
        (["--step", "1"], "unrecognized arguments: --step 1"),
    ],
)
def test_a_bad_option_is_one_line(options, words, monkeypatch, capsys):
    assert ends(PORT, monkeypatch, *options) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {words}")
    assert line.count("\n") == 1


# ---- the table of leaves ------------------------------------------------------------------------

ROWS = [
    (["a.{i}.q", "a.{i}.k"], "qk.T"),  # joined there, stacked here
    ("a.{i}.g", ["left/{i}", "right/{i}"]),  # split here
    ("a.2.q", "last"),
    ("a.{i}.s", "scales"),  # scalars
]
TORCH = {f"a.{i}.{n}": (s, 3) for i in range(2) for n, s in (("q", 4), ("k", 2), ("g", 5))}
TORCH |= {"a.2.q": (2, 2), "a.0.s": (), "a.1.s": ()}
OURS = {"qk": (2, 3, 6), "last": (2, 2), "scales": (2,)}
OURS |= {f"left/{i}": (1, 3) for i in range(2)} | {f"right/{i}": (4, 3) for i in range(2)}


def test_leaves_go_there_and_back():
    table = leaves.table(ROWS, TORCH, OURS)
    random = np.random.default_rng(0)
    drawn = {path: random.normal(size=shape) for path, shape in OURS.items()}
    named = table.moved(drawn, 0)
    assert {name: array.shape for name, array in named.items()} == TORCH
    np.testing.assert_array_equal(named["a.1.k"], drawn["qk"][1].T[4:])
    np.testing.assert_array_equal(named["a.0.g"][1:], drawn["right/0"])
    back = table.moved(named, 1)
    for path, leaf in drawn.items():
        np.testing.assert_array_equal(back[path], leaf)


def test_a_stack_begins_with_the_first_layer_that_no_other_row_names():
    rows = [("b.0.w", "first"), ("b.{i}.w", "rest")]
    table = leaves.table(
        rows, {f"b.{i}.w": (3,) for i in range(3)}, {"first": (3,), "rest": (2, 3)}
    )
    drawn = {"first": np.zeros(3), "rest": np.arange(6.0).reshape(2, 3)}
    np.testing.assert_array_equal(table.moved(drawn, 0)["b.2.w"], drawn["rest"][1])


def test_layers_in_each_others_place_are_seen():
    class Reversed(Tiny):
        def forward(self, tokens_BxL):
            self.blocks = self.blocks[::-1]
            result = super().forward(tokens_BxL)
            self.blocks = self.blocks[::-1]
            return result

    proved = portproof.prove(changed(torch_model=Reversed), float32=False)
    assert not proved.passed
    assert proved.first.rung == "2 taps forward"


# ---- taps and masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [1, 8])
@pytest.mark.parametrize("depth", [3, 7])
def test_a_scanned_taps_calls_are_in_order(depth, unroll, remat):
    """Values and gradients are those of a loop in Python, whatever the compiler makes of it."""
    kernels = np.random.default_rng(0).normal(0, 0.5, (depth, D, D)).astype(np.float32)

    def block(x, kernel):
        return x + portproof.tap("h", jnp.tanh(x @ kernel)), None

    def scanned(kernels, zero):
        taps.zero = zero
        run = jax.checkpoint(block) if remat else block
        return (jax.lax.scan(run, jnp.ones((2, D)), kernels, unroll=unroll)[0] ** 2).sum()

    def looped(deltas):
        x, values = jnp.ones((2, D)), []
        for kernel, delta in zip(kernels, deltas, strict=True):
            values.append(jnp.tanh(x @ kernel) + delta)
            x = x + values[-1]
        return (x**2).sum(), values

    forward, backward = (Pass("h") for _ in range(2))
    with taps.recording(forward):
        jax.jit(scanned)(kernels, 0.0)
    jax.clear_caches()
    with taps.recording(backward):
        jax.jit(jax.grad(scanned))(kernels, 0.0)
    deltas = [jnp.zeros((2, D))] * depth
    gradients, values = jax.grad(looped, has_aux=True)(deltas)
    np.testing.assert_allclose(forward.values["h"], values, rtol=1e-5)
    np.testing.assert_allclose(backward.gradients["h"][::-1], gradients, rtol=1e-4)
    assert len(forward.values["h"]) == depth


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"by name": True},
        {"enable_gqa": True},
        {"attn_mask": torch.arange(25).view(5, 5) % 3 > 0},
        {"attn_mask": torch.arange(25.0).view(5, 5)},
    ],
    ids=str,
)
def test_attention_by_hand_is_the_fused_one(options):
    """On a mask that keeps all, up to the rescaling; and the mask drops what it says."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 6).unbind()
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    keep = np.ones((2, 4, 5, 5), bool)
    keep[1, 2] = False
    module = torch.nn.Module()
    how = {"attn_mask": None} | options
    place = how.pop("attn_mask"), 0.5  # by place, as no other test does
    module.forward = lambda q: F.scaled_dot_product_attention(q, k, v, *place, **how)
    if options.pop("by name", False):
        named = {"query": q, "key": k, "value": v, "dropout_p": 0.5}
        module.forward = lambda q: F.scaled_dot_product_attention(**named)
    listener = torch_side.Listener(wide=False, masks={"": [keep]})
    with listener.listening(module):
        found = module(q)
    expected = 2 * F.scaled_dot_product_attention(q, k, v, **options)
    expected[1, 2] = 0
    torch.testing.assert_close(found, expected)


# ---- the page of a port, and the examples --------------------------------------------------------


def without_figures(printed):
    """What is the same on every machine: the rungs, how many differ, and the first place."""
    return re.sub(r"  \S+ of \S+, .*|drift .*|[0-9]e[-+][0-9]+", "", printed)


@slow
def test_the_page_prints_what_it_says(capsys):
    text = (ROOT / "docs/port_your_own.md").read_text()
    codes = re.findall(r"<!-- run -->\n```python\n(.*?)```", text, re.S)
    printed = re.findall(r"<!-- printed -->\n```text\n(.*?)```", text, re.S)
    assert len(codes[0].splitlines()) <= 60
    assert "first difference: block 0: attention" in printed[0]
    assert printed[1].endswith("equal at every place\n")
    assert len(codes) == text.count("```python")
    names: dict = {}
    for code in codes:
        exec(code, names)
    assert without_figures(capsys.readouterr().out) == without_figures("".join(printed))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


EXAMPLES = [
    "model1",
    *(pytest.param(name, marks=slow) for name in ("llama", "encoder", "gpt2", "model5")),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_equal(name, example):
    proved = portproof.prove(example(name).port())
    assert proved.passed, proved
    assert "equal at every place" in page(proved)


@slow
@pytest.mark.parametrize(("n_layers", "tied"), [(1, True), (3, False)])
def test_other_configurations_of_gpt2_are_equal(n_layers, tied, example):
    proved = portproof.prove(example("gpt2").port(n_layers, tied), float32=False)
    assert proved.passed, proved


FOUND = {
    ("model1", "tanh"): "gelu",
    ("model1", "no gradient"): "what uses embedding, backward",
    ("model1", "decay"): "embed/embedding, moved by 1",
    ("llama", "pairs"): "layer 0: rotated q",
    ("llama", "groups"): "layer 0: weights",
    ("llama", "gelu"): "layer 0: SwiGLU",
    ("encoder", "epsilon"): "layer 0: norm 1",
    ("encoder", "padding"): "layer 0: attention",
    ("encoder", "rate"): "layer 0: attention",
    ("gpt2", "epsilon"): "block 0: ln_1",
    ("gpt2", "heads"): "block 0: attention",
    ("gpt2", "no gradient"): "what uses block 2: v, backward",
    ("model5", "tanh"): "block 0: gelu",
    ("model5", "unscaled"): "block 0: attention",
    ("model5", "rate"): "drop",
}


@pytest.mark.parametrize(
    "planted", [pytest.param(p, marks=() if p[0] == "model1" else slow) for p in FOUND], ids=str
)
def test_an_examples_fault_is_named(planted, example):
    name, fault = planted
    module = example(name)
    assert {f for n, f in FOUND if n == name} == module.FAULTS.keys()
    with module.FAULTS[fault]():
        proved = portproof.prove(module.port(), float32=False)
    assert proved.first.culprit == FOUND[planted], proved
    assert f"first difference: {FOUND[planted]}" in page(proved)

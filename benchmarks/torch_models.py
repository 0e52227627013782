"""The PyTorch side, as public code writes it: attention, interleaved attention, and a plain GPT with its optimizer.

Runs in the worker process only. Shapes: B batch, N tokens, H heads, d head width, P pseudo-heads, D width, L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812 # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

Runner = Callable[[], Sequence[Tensor]]


def rope_tables(count: int, width: int, theta: float | None, device: str) -> tuple[Tensor, Tensor] | None:
    if theta is None:
        return None
    angles = np.arange(count, dtype=np.float64)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = (torch.tensor(table, dtype=torch.float32, device=device) for table in (np.cos(angles), np.sin(angles)))
    return cos, sin


def rotate(x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B, H, T, d] by positions 0 .. T-1, half-split pairs."""
    if tables is None:
        return x
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def multi_head(q: Tensor, k: Tensor, v: Tensor, *, tables: Any, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        rotate(q, tables), rotate(k, tables), v, attn_mask=mask, is_causal=mask is None
    )
    return out.transpose(1, 2)


def interleaved(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor, tables: Any, mask: Tensor | None) -> Tensor:
    """All N*P pseudo-tokens of every head, one attention over them with a [N*P, N*P] mask, collapse."""
    alpha_q, alpha_k, alpha_v, collapse = weights
    B, N, H, d = q.shape
    P = alpha_q.shape[2]

    def virtual(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.einsum("bnmd,mhp->bhnpd", x, alpha).reshape(B, H, N * P, d)

    queries, keys = rotate(virtual(q, alpha_q), tables), rotate(virtual(k, alpha_k), tables)
    out = F.scaled_dot_product_attention(queries, keys, virtual(v, alpha_v), attn_mask=mask, is_causal=mask is None)
    return torch.einsum("bhnpd,ghp->bngd", out.view(B, H, N, P, d), collapse)


def band(count: int, window: int | None, device: str) -> Tensor | None:
    """[count, count]: query i sees key j when `0 <= i - j < window`; None (plain causal) without a window."""
    if window is None or window >= count:
        return None
    return torch.ones(count, count, dtype=torch.bool, device=device).tril().triu(1 - window)


def attention(device: str, arrays: dict[str, np.ndarray], request: dict[str, Any]) -> tuple[Runner, list[str]]:
    """A run of output and gradients, and the names of what it returns."""
    dtype = getattr(torch, request["dtype"])
    tensors = {name: torch.tensor(x, dtype=dtype, device=device) for name, x in arrays.items()}
    cotangent = tensors.pop("cotangent")
    given = [x.requires_grad_(request["backward"]) for x in tensors.values()]
    N, d = arrays["q"].shape[1], arrays["q"].shape[3]
    is_iha = "alpha_q" in arrays
    positions = N * arrays["alpha_q"].shape[2] if is_iha else N
    tables = rope_tables(positions, d, request["rope_theta"], device)
    mask = band(positions, request["window"], device)
    attend = interleaved if is_iha else multi_head
    attend = torch.compile(attend) if request["compiled"] else attend

    def run() -> Sequence[Tensor]:
        out = attend(*given, tables=tables, mask=mask)
        return (out, *torch.autograd.grad(out, given, cotangent)) if request["backward"] else (out,)

    names = ["output", *(f"gradient of {name}" for name in tensors)] if request["backward"] else ["output"]
    return run, names


class Block(nn.Module):
    """Pre-norm attention and MLP, no biases; weights of layer l taken from the stacked arrays."""

    def __init__(self, arrays: dict[str, Tensor], layer: int, heads: int, epsilon: float):
        super().__init__()
        D = arrays["query"].shape[1]
        self.heads, self.epsilon = heads, epsilon
        qkv = [arrays[name][layer].reshape(D, -1).T for name in ("query", "key", "value")]
        self.qkv = nn.Parameter(torch.cat(qkv).contiguous())
        self.output = nn.Parameter(arrays["output"][layer].reshape(-1, D).T.contiguous())
        self.up = nn.Parameter(arrays["up"][layer].T.contiguous())
        self.down = nn.Parameter(arrays["down"][layer].T.contiguous())
        self.attention_norm = nn.Parameter(arrays["attention_norm"][layer].clone())
        self.mlp_norm = nn.Parameter(arrays["mlp_norm"][layer].clone())

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        B, N, D = x.shape
        normed = F.rms_norm(x, (D,), self.attention_norm, self.epsilon)
        q, k, v = F.linear(normed, self.qkv).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q, tables), rotate(k, tables), v, is_causal=True)
        x = x + F.linear(out.transpose(1, 2).reshape(B, N, -1), self.output)
        hidden = F.gelu(F.linear(F.rms_norm(x, (D,), self.mlp_norm, self.epsilon), self.up), approximate="tanh")
        return x + F.linear(hidden, self.down)


class Gpt(nn.Module):
    """The smallest plain GPT with RoPE and RMSNorm: tied embeddings, mean cross-entropy in float32."""

    def __init__(self, arrays: dict[str, Tensor], request: dict[str, Any], context: int):
        super().__init__()
        self.epsilon = request["norm_epsilon"]
        self.embedding = nn.Parameter(arrays["embedding"].clone())
        layers = arrays["query"].shape[0]
        self.blocks = nn.ModuleList(Block(arrays, i, request["heads"], self.epsilon) for i in range(layers))
        self.final_norm = nn.Parameter(arrays["final_norm"].clone())
        tables = rope_tables(context, arrays["query"].shape[3], request["rope_theta"], str(arrays["query"].device))
        assert tables is not None
        self.register_buffer("cos", tables[0])
        self.register_buffer("sin", tables[1])

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = F.embedding(inputs, self.embedding)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        x = F.rms_norm(x, x.shape[-1:], self.final_norm, self.epsilon)
        logits = F.linear(x, self.embedding)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def training(device: str, arrays: dict[str, np.ndarray], request: dict[str, Any]) -> tuple[Runner, list[str]]:
    """A run of one AdamW step (clipping included) that returns the loss before it."""
    inputs = torch.tensor(arrays.pop("inputs"), dtype=torch.long, device=device)
    targets = torch.tensor(arrays.pop("targets"), dtype=torch.long, device=device)
    model = Gpt({name: torch.tensor(x, device=device) for name, x in arrays.items()}, request, inputs.shape[1])
    norms = [p for p in model.parameters() if p.ndim == 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": request["weight_decay"]}, {"params": norms, "weight_decay": 0.0}],
        lr=request["learning_rate"],
        betas=(request["beta1"], request["beta2"]),
        eps=request["epsilon"],
        fused=True,
    )
    forward = torch.compile(model) if request["compiled"] else model
    half = request["dtype"] == "bfloat16"

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = forward(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), request["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # here, so that gradients are temporaries of the step
        return loss.detach()

    return lambda: (step(),), ["loss"]

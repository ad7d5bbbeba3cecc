"""The same calls in five ways: eager, eager with what PyTorch has alone, as a CUDA graph of that, as one with our
kernel for a single token, and compiled and then captured as a graph.

An eager call at one token waits for the processor, which launches a dozen kernels one by one; a graph launches them all
at once, so that what remains is the accelerator's own time. A graph repeats exactly what was captured: the same kernels
on the same memory, which is why everything here runs without asking the accelerator for a number. Where there are no
CUDA graphs the plain call stands in, so that every path runs on a processor too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from hyperfade.measure import LayerTime, time_alternately, weight_bytes
from hyperfade.nn import execution, kernel_use

Way = Literal["graph", "kernel", "eager", "torch", "compiled"]
_WARM_CALLS = 3  # before a capture: libraries set themselves up in the first ones, which a capture forbids


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call` as one launch. It has to read and write the same memory every time, and runs a few times on the way."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_CALLS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.inference_mode()
def time_loops(
    layers: dict[str, list[nn.Module]], width: int, tokens: int, way: Way, rounds: tuple[int, int] = (5, 15)
) -> dict[str, LayerTime]:
    """Seconds per call of each layer on the same (tokens, width) input, from loops over its copies: one loop is one
    launch where the way is a graph. Calls of one loop find their weights in memory, not in a cache."""
    some = next(next(iter(layers.values()))[0].parameters())
    x = torch.randn(tokens, width).to(some)
    flops = {}
    for name, (layer, *_) in layers.items():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops[name] = counter.get_total_flops()
    with without_kernels() if way in ("graph", "torch") else nullcontext():  # a graph keeps what it captured
        loops = {name: _loop(same, x, way) for name, same in layers.items()}
        times = time_alternately(loops, rounds=rounds)
    return {
        name: LayerTime(
            tuple(taken / len(layers[name]) for taken in seconds), flops[name], weight_bytes(layers[name][0])
        )
        for name, seconds in times.items()
    }


@contextmanager
def without_kernels() -> Iterator[None]:
    """What PyTorch has, whatever the number of tokens."""
    with patch.object(kernel_use, "kernels_run", _never), patch.object(execution, "kernels_run", _never):
        yield


def _never(device_type: str) -> bool:
    return False


def _loop(layers: Sequence[nn.Module], x: Tensor, way: Way) -> Callable[[], object]:
    run = _compiled(x.device) if way == "compiled" else _run

    def loop() -> None:
        for layer in layers:
            run(layer, x)

    return loop if way in ("eager", "torch") else captured(loop, x.device)


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _compiled(device: torch.device) -> Callable[[nn.Module, Tensor], Tensor]:
    """`_run` compiled afresh. In full, so that nothing falls back to eager in silence; the copies of a layer differ in
    their weights alone and share the code. Without an accelerator only the tracing is tried."""
    torch.compiler.reset()
    how: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if device.type != "cpu" else {"backend": "eager"}
    return torch.compile(_run, fullgraph=True, dynamic=False, **how)


@dataclass(frozen=True)
class DecodeState:
    """All that a decoding step reads and writes besides weights: the token (B, 1), its places (3, B, 1) and the cache,
    which holds `length` tokens at the start."""

    token: Tensor
    places: Tensor
    cache: StaticCache
    length: int

    def step_(self, model: Any) -> None:
        """Decode one token greedily, in place."""
        output = model(input_ids=self.token, position_ids=self.places, past_key_values=self.cache, use_cache=True)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.places.add_(1)

    def rewind_(self, token: Tensor, places: Tensor) -> None:
        """Back to the start: later entries of the cache are overwritten, and masked until then."""
        self.token.copy_(token)
        self.places.copy_(places)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)


def decode_state(model: Any, token: Tensor, cache: Any, batch: int, spare: int) -> DecodeState:
    """The state after a prefill (of Qwen-VL models, which keep what an image takes off a token's place) for `batch`
    equal requests, with room for `spare` more tokens."""
    length = cache.get_seq_length()
    static = StaticCache(config=model.config, max_cache_len=length + spare)
    for index, layer in enumerate(cache.layers):
        static.update(layer.keys.repeat_interleave(batch, 0), layer.values.repeat_interleave(batch, 0), index)
    places = (length + model.model.rope_deltas[:1]).expand(3, batch, 1).contiguous()
    return DecodeState(token.repeat(batch, 1), places, static, length)


def decoder(model: Any, token: Tensor, cache: Any, batch: int, new_tokens: int) -> Callable[[], object]:
    """A call that decodes `new_tokens` greedily over a static cache, one graph launch each, always from the same state;
    it returns the last token (batch, 1)."""
    state = decode_state(model, token, cache, batch, max(new_tokens, _WARM_CALLS + 1))
    start = state.token.clone(), state.places.clone()
    step = captured(partial(state.step_, model), token.device)

    def decode() -> Tensor:
        state.rewind_(*start)
        for _ in range(new_tokens):
            step()
        return state.token

    return decode

"""Serving: what makes inference engines run a compressed checkpoint as it is. vLLM finds `register` by itself."""


def register() -> None:
    """Tell vLLM how the layers of `quant_method: hyperfade` are loaded and run; vLLM calls this in all its processes.

    vLLM is an optional dependency: only this call imports it.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from hyperfade.hub.quantizer import METHOD
    from hyperfade.serve.plugin import EngineConfig

    register_quantization_config(METHOD)(EngineConfig)

"""The tests of the engine need vLLM, in the environment that `make test-vllm` makes."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_vllm_*.py"]

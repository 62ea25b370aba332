"""ONNX Runtime backend: runs every graph, the default without built engines and the reference for parity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sa3_trt_core import gpu
from sa3_trt_core.artifacts.external_data import external_data_names, with_small_tensors
from sa3_trt_core.engines.backend import Backend
from sa3_trt_core.engines.base import DeviceEngine, run_rows
from sa3_trt_core.errors import ToolError, memory_error
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
SIDECAR_FOLDER = "session.model_external_initializers_file_folder_path"  # session option of a graph passed as bytes
SMALL_OUTSIDE = "external tensors"  # in the error for shapes or axes stored in a sidecar
NO_PACKED_WEIGHTS = "session.disable_prepacking"
PLUG_IN = "diff_attn_swa"  # custom op of the published SAME decoder and encoder
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
FATAL_ONLY = 4  # log level: errors are reported once, as ToolError
MAX_REASON_LENGTH = 240


class _Input(NamedTuple):
    type: str
    shape: tuple[Any, ...]


class OnnxRuntimeEngine(DeviceEngine):
    """Session of one ONNX file, on the GPU if ONNX Runtime and the machine support it, else on the CPU."""

    def __init__(self, path: Path, variant: bytes | None = None, low_memory: bool = False) -> None:
        """Load `path`; `variant` replaces the graph of the file, with the same sidecars.

        `low_memory` keeps the weights memory-mapped: by default ONNX Runtime packs a copy of every fp32 weight and
        folds an fp32 copy of every fp16 one, 6 GB at full size. Steps are slightly slower.

        Raises ToolError if ONNX Runtime cannot run the file, or a sidecar is missing.
        """
        import onnxruntime

        for name in external_data_names(path):
            if not (path.parent / name).is_file():
                raise ToolError(f"{path} needs {name} beside it, which is missing", "get or make both files again")
        options = onnxruntime.SessionOptions()
        # FP8 Q/DQ pairs run on the CPU only at this level: higher ones fuse them into kernels that do not exist.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if low_memory:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry(NO_PACKED_WEIGHTS, "1")
            options.enable_mem_pattern = options.enable_cpu_mem_arena = False
            # The default execution order casts weights of graphs with many outputs long before use: 2 GB more.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.log_severity_level = FATAL_ONLY
        if variant is not None:
            options.add_session_config_entry(SIDECAR_FOLDER, str(path.parent.resolve()))
        providers, has_gpu = [CPU_PROVIDER], gpu.has_nvidia_gpu()
        if on_gpu():
            providers.insert(0, CUDA_PROVIDER)
        try:
            self._session: Any = _session(path, variant, options, providers)
        except ToolError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise memory_error(error, f"{path} was loaded") or _refusal(path, str(error)) from None
        self.device = "cuda" if CUDA_PROVIDER in self._session.get_providers() else "cpu"
        self.cpu_reason = _cpu_reason(providers) if has_gpu and self.device == "cpu" else ""
        self._path = path
        # Copied: an output of a session keeps the session and its mapped weights alive.
        self._inputs = {value.name: _Input(value.type, tuple(value.shape)) for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.input_names = tuple(self._inputs)
        self.output_names = tuple(self._outputs)
        first = next(iter(self._inputs.values())).shape if self._inputs else []
        self.max_batch: int | None = first[0] if first and isinstance(first[0], int) else None

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs for named inputs. A graph of fixed batch 1, as the published ones, runs row by row."""
        missing = sorted(self._inputs.keys() - inputs.keys())
        unknown = sorted(inputs.keys() - self._inputs.keys())
        if missing or unknown:
            raise ToolError(
                f"{self._path} takes {', '.join(self._inputs)}, not {', '.join(inputs)}", "use the ONNX of that target"
            )
        name, first = next(iter(inputs.items()))
        fixed = self._inputs[name].shape
        if first.dim() and first.shape[0] > 1 and fixed and fixed[0] == 1:
            return run_rows(self._run_once, inputs)
        return self._run_once(inputs)

    def close(self) -> None:
        self._session = None

    def _run_once(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        feeds = {}
        for name, value in inputs.items():
            spec = self._inputs[name]
            array = value.detach().cpu().contiguous().numpy().astype(_NUMPY_TYPES[spec.type], copy=False)
            # A scalar may be declared as [] or [1].
            feeds[name] = array.reshape((1,) * len(spec.shape)) if array.ndim == 0 else array
        place = next(iter(inputs.values())).device
        try:
            results = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise memory_error(error, f"{self._path} ran") or ToolError(
                f"ONNX Runtime failed in {self._path}: {_end_of(str(error))}",
                "check that it is the ONNX of that target, and that memory is free for this length",
            ) from None
        return {name: torch.from_numpy(result).to(place) for name, result in zip(self._outputs, results, strict=True)}


def _session(path: Path, variant: bytes | None, options: Any, providers: list[str]) -> Any:
    """Return the session of a file or variant; shapes and axes from a sidecar are inlined in a copy in memory."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(variant or str(path), options, providers=providers)
    except Exception as error:
        if SMALL_OUTSIDE not in str(error):
            raise
    options.add_session_config_entry(SIDECAR_FOLDER, str(path.parent.resolve()))
    return onnxruntime.InferenceSession(with_small_tensors(path, variant), options, providers=providers)


def open_graph(path: Path, target: Target, rebuild: str, onnx: Path | None) -> OnnxRuntimeEngine:
    """Load the ONNX file itself, which needs no build."""
    return OnnxRuntimeEngine(path)


def on_gpu() -> bool:
    """Return True if sessions run on this machine's GPU."""
    import onnxruntime

    return gpu.has_nvidia_gpu() and CUDA_PROVIDER in onnxruntime.get_available_providers()


BACKEND = Backend("onnxruntime", "ONNX Runtime", "onnxruntime", open_graph, on_cpu=True, on_gpu=on_gpu)


def _cpu_reason(providers: list[str]) -> str:
    """Return the reason why a session runs on the CPU of a machine with a GPU."""
    if CUDA_PROVIDER in providers:
        return "ONNX Runtime's CUDA libraries do not load (its CUDA and cuDNN must be those that it was built for)"
    return "this ONNX Runtime has no CUDA (pip uninstall onnxruntime, then pip install onnxruntime-gpu)"


def _refusal(path: Path, text: str) -> ToolError:
    if PLUG_IN in text:
        return ToolError(
            f"{path} holds the plug-in op {PLUG_IN}, which ONNX Runtime does not have",
            f"make plain operators of it in a folder of your own and give that as `onnx_root=ROOT`: "
            f"python build/lower_attention.py --input {path} --onnx ROOT/{path.parent.name}/{path.name}",
        )
    if "is not a registered function/op" in text:
        return ToolError(
            f"{path} needs an operator that ONNX Runtime does not have: {text}",
            "use our own export with plain operators: python build/export_onnx.py --model-dir DIR --onnx-root ROOT",
        )
    return ToolError(f"ONNX Runtime cannot load {path}: {_end_of(text)}", "download or make it again")


def _end_of(text: str) -> str:
    """Return the end of a message: ONNX Runtime puts C++ signatures first and the cause last."""
    return text if len(text) <= MAX_REASON_LENGTH else f"... {text[-MAX_REASON_LENGTH:]}"

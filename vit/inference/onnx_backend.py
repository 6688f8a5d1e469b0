"""Compute logits of an ONNX file with ONNX Runtime, on the CPU.  No torch.

Notes:
- The number of threads is that of the processors this process may use (affinity and container quota), not of the
  machine.  Threads do not spin when idle, so that decoding threads get time.
- The first result comes early: the weights stay in the file, mapped (`vit.inference.onnx_file`), and a thread builds
  the session while the first images are decoded.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.checksums import check_onnx
from vit.errors import VitError
from vit.inference.description import Description
from vit.inference.onnx_file import check_graph, read_outline
from vit.processors import count_cpus, free_memory

if TYPE_CHECKING:
    from vit.model import VisionTransformer

INPUT, OUTPUT, ROLLOUT, METADATA_KEY = "image", "logits", "rollout", "vit"
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


def runtime() -> Any:
    """Import `onnxruntime` without telemetry, unless the environment sets it.

    From 1.29 on it would send what is computed, and on which machine, to its maker, and store an identifier of the
    machine in the home folder, or warn if there is none.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    import onnxruntime

    return onnxruntime


@functools.cache
def _limit_memory(runtime: Any) -> bool:
    """Let all sessions of this process take at most three quarters of the memory that is free; True where that holds.

    A few nodes that double what they are given ask for any amount, which shows only when they are run.
    """
    free = free_memory()
    with contextlib.suppress(Exception):  # an older runtime, or a program that has set it already
        place = runtime.OrtMemoryInfo(
            "Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT
        )
        usual = dict.fromkeys(("arena_extend_strategy", "initial_chunk_size_bytes", "max_dead_bytes_per_chunk"), -1)
        if free is not None:
            arena = runtime.OrtArenaCfg({**usual, "max_mem": free // 4 * 3})
            runtime.create_and_register_allocator(place, arena)
            return True
    return False


def open_session(path: str | os.PathLike[str]) -> Any:
    """Open an `onnxruntime.InferenceSession` of the file.  Raises `VitError` when it is missing or no ONNX model."""
    path = _check_file(path)
    outline = _try_outline(path)
    return _session(path, outline[0] if outline else None, count_cpus())


def _check_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise VitError(f"{path} is a folder, not an ONNX file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise VitError(f"{path} is empty")
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None
    return path


def _try_outline(path: Path) -> tuple[bytes, dict[str, str]] | None:
    """Read the outline of the file; None if the runtime has to read the whole file and report its errors."""
    try:
        str(path.absolute()).encode()  # the library takes names in UTF-8 only
        return read_outline(path)
    except (OSError, ValueError):
        return None


def _session(path: Path, outline: bytes | None, threads: int) -> Any:
    """Open a session of the file, from its outline if the runtime accepts it."""
    onnxruntime = runtime()
    check_onnx(path)
    try:
        foldable = check_graph(path)
    except (OSError, ValueError) as error:
        raise VitError(f"{path} is damaged or not an ONNX model of a Vision Transformer: {error}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors become the exception below
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _limit_memory(onnxruntime):
        options.add_session_config_entry("session.use_env_allocators", "1")
    kinds: dict[str, Any] = {"providers": ["CPUExecutionProvider"]}
    if not foldable:  # what is computed while a session is built is not limited
        kinds["disabled_optimizers"] = ["ConstantFolding"]
    if outline is not None:
        options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(path.absolute().parent))
        try:
            return onnxruntime.InferenceSession(outline, options, **kinds)
        except Exception:  # an older runtime, or a damaged file, which is reported below
            pass
    try:
        name = str(path)
        name.encode()
        model: str | bytes = name
    except UnicodeEncodeError:
        model = path.read_bytes()
    try:
        return onnxruntime.InferenceSession(model, options, **kinds)
    except Exception as error:  # the library's exceptions share no base class
        reason = str(error).splitlines()[0][:160]
        raise VitError(f"{path} is damaged or not an ONNX model: {reason}") from None


def read_description(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Description:
    """Read the description in a file's metadata.  Raises `VitError` when it is not a file of this project."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise VitError(
            f"{os.fspath(path)} is an ONNX model that does not describe its classes and preprocessing: "
            "expected one that `vit export` wrote"
        )
    return Description.from_json(text, path)


def session_description(session: Any, path: str | os.PathLike[str]) -> Description:
    """Read the description of the file of a session."""
    return read_description(session.get_modelmeta().custom_metadata_map, path)


class OnnxBackend:
    """Computes logits float32 (B, K) of images float32 (B, C, H, W) with ONNX Runtime.

    The session is built in the background; `ready` raises its errors as `VitError`.  A pickle holds the path of the
    file and the description; unpickling opens the file again.
    """

    name = "onnx"
    device = "cpu"

    def __init__(
        self, path: str | os.PathLike[str], description: Description | None = None, *, throughput: bool = False
    ) -> None:
        """Start to build the session; with `throughput`, one processor computes each image."""
        self._path, self._throughput = _check_file(path), throughput
        threads = 1 if throughput else count_cpus()
        self.threads = count_cpus() if throughput else min(4, count_cpus())
        outline = _try_outline(self._path)
        if outline is None:  # the runtime may read files that `read_outline` cannot
            session = _session(self._path, None, threads)
            metadata = session.get_modelmeta().custom_metadata_map
            self._opened: Future[Any] = Future()
            self._opened.set_result(session)
        else:
            message, metadata = outline
            executor = ThreadPoolExecutor(1, thread_name_prefix="session")
            self._opened = executor.submit(_session, self._path, message, threads)
            executor.shutdown(wait=False)
        embedded = read_description(metadata, path)
        self.description = description or embedded
        self._session: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # a session cannot be pickled; the other process opens the file again, from any working folder
        return functools.partial(OnnxBackend, throughput=self._throughput), (self._path.absolute(), self.description)

    def ready(self) -> None:
        """Wait until the session is open.  Raises `VitError` when the file does not fit its description."""
        if self._session is None:
            session = self._opened.result()
            self._check(session)
            self._session = session

    def _check(self, session: Any) -> None:
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = {node.name: node for node in session.get_outputs()}
        if set(inputs) != {INPUT} or OUTPUT not in outputs:
            raise VitError(f"{self._path}: expected input {INPUT!r} and output {OUTPUT!r}, not {list(inputs)}")
        architecture = self.description.architecture
        expected = [architecture["in_channels"], *architecture["image_size"]]
        if inputs[INPUT].shape[1:] != expected or outputs[OUTPUT].shape[1:] != [architecture["num_classes"]]:
            raise VitError(f"{self._path}: the model inside is not the one that its description tells of")

    def logits(self, images: np.ndarray) -> np.ndarray:
        self.ready()
        try:
            return self._session.run([OUTPUT], {INPUT: images})[0]
        except Exception as error:  # the library's exceptions share no base class
            short = "smaller than requested" in str(error) or "Failed to allocate" in str(error)
            reason = "it takes more memory than there is" if short else str(error).splitlines()[0][:160]
            raise VitError(f"{self._path} cannot be computed for {len(images)} images at once: {reason}") from None

    def network(self) -> VisionTransformer:
        """Load the torch module from the file's bundle, or from the weights in the file, on the CPU.

        Raises `VitError` when torch cannot read them.
        """
        from vit.inference.bundle import ONNX, WEIGHTS
        from vit.inference.loading import load_torch

        folder = self._path.parent
        bundled = self._path.name == ONNX and (folder / WEIGHTS).is_file()
        return load_torch(folder if bundled else self._path, device="cpu")[0]

"""`vlmtune env`: what a bug report needs to know of a machine, as Markdown."""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..core.distributed import usable_cores
from ..core.logging import quiet_hosts

# Distribution -> the module that is imported to see whether it works.
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "trl": "trl",
    "peft": "peft",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "bitsandbytes": "bitsandbytes",
    "flash-attn": "flash_attn",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface-hub": "huggingface_hub",
    "numpy": "numpy",
    "pillow": "PIL",
    "av": "av",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
}

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Of a container: bytes, or "max" (cgroup v2)."""

_FAMILIES = (
    *("ACCELERATE_", "BNB_", "CUDA_", "CUBLAS_", "DS_", "GLOO_", "HF_", "HUGGING_FACE_", "MKL_"),
    *(
        "NCCL_",
        "NVIDIA_",
        "OMP_",
        "PYTORCH_",
        "TENSORBOARD_",
        "TOKENIZERS_",
        "TORCH",
        "TRANSFORMERS_",
    ),
    *("TRITON_", "UCX_", "WANDB_"),
)
_NAMES = (
    *("CC", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "TMPDIR", "NO_COLOR"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("NNODES", "NODE_RANK", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID", "SLURM_NTASKS"),
    *("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"),
)
_SECRET = re.compile("TOKEN(?!IZ)|KEY|SECRET|PASS|AUTH|CRED|JWT|COOKIE|PROXY", re.IGNORECASE)


def main(argv: Sequence[str]) -> None:
    """Print the report; a package that is missing or broken is part of it, not an error.

    Raises:
        SystemExit: 0 after `--help`, 2 for an unknown flag.
    """
    argparse.ArgumentParser(
        prog="vlmtune env",
        description="Print versions, devices, engines and environment variables as Markdown, to "
        "paste into a bug report. Secrets are not printed.",
        epilog="More: docs/check.md",
        allow_abbrev=False,
    ).parse_args(argv)
    quiet_hosts()
    given = variables(dict(os.environ))  # before packages set some of their own
    with redirect_stdout(sys.stderr):  # DeepSpeed and others talk while they are imported
        packages = {name: state_of(name, module) for name, module in PACKAGES.items()}
        tables = {
            f"vlmtune {__version__}{_commit()}": machine(),
            "Packages": packages,
            "Engines": engines(packages),
            "Environment": given,
        }
    print("\n\n".join(_table(title, rows) for title, rows in tables.items()))


def state_of(distribution: str, module: str) -> str:
    """Its version and, where importing it fails, why."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return "not installed"
    try:
        import_module(module)
    except Exception as error:  # whatever a broken package raises is what we want to know
        return f"{found}, cannot be imported: {_reason(error)}"
    return found


def machine() -> dict[str, str]:
    """Interpreter, system, cores, memory and GPUs."""
    rows = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "CPU": f"{_processor()}, {usable_cores()} usable cores of {os.cpu_count()}",
        "memory": _memory(),
    }
    if hasattr(os, "statvfs") and Path("/dev/shm").is_dir():
        found = os.statvfs("/dev/shm")
        rows["/dev/shm"] = _size(found.f_blocks * found.f_frsize)
    return rows | dict(_gpus())


def engines(packages: dict[str, str]) -> dict[str, str]:
    """What attention, ZeRO, quantisation and video run on."""
    flash = packages["flash-attn"]
    rows = {"attention": "eager, sdpa" + (", flash_attention_2" if _works(flash) else "")}
    if _works(packages["deepspeed"]):
        rows["DeepSpeed"] = "; ".join(_deepspeed())
    if _works(packages["bitsandbytes"]):
        from bitsandbytes.cextension import lib

        loaded = type(lib).__name__ != "ErrorHandlerMockBNBNativeLibrary"
        kind = "CUDA" if lib.compiled_with_cuda else "CPU"
        rows["bitsandbytes"] = f"{kind} library" if loaded else "its library does not load"
    if _works(packages["av"]):
        import av

        major, minor, _ = av.library_versions["libavcodec"]
        rows["video"] = f"PyAV, libavcodec {major}.{minor}"
    compilers = {"g++": "--version", "nvcc": "--version", "ninja": "--version"}
    rows["compilers"] = ", ".join(f"{name} {_tool(name, flag)}" for name, flag in compilers.items())
    return rows


def variables(environment: dict[str, str]) -> dict[str, str]:
    """Variables that change a run; of one that may hold a secret only that it is set."""
    home = f"{Path.home()}/"
    return {
        name: "set, not shown"
        if _SECRET.search(name) or re.search(r"://[^/\s]*@", value)
        else value.replace(home, "~/" if len(home) > 2 else home)
        for name, value in sorted(environment.items())
        if name in _NAMES or name.startswith(_FAMILIES)
    }


def _gpus() -> Iterator[tuple[str, str]]:
    try:
        import torch

        torch.cuda.init()
    except Exception as error:  # no torch, a torch without CUDA, no driver: the reason says which
        yield "GPU", f"none: {_reason(error)}"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            half = torch.cuda.is_bf16_supported(including_emulation=False)
        yield (
            f"GPU {index}",
            f"{found.name}, {_size(found.total_memory)}, compute capability "
            f"{found.major}.{found.minor}, {'bf16' if half else 'no bf16'}",
        )
    try:
        driver = Path("/proc/driver/nvidia/version").read_text("utf-8")
        yield "driver", (re.findall(r"\s(\d+(?:\.\d+)+)\s", driver) or ["unknown"])[0]
    except OSError:
        pass  # another vendor, or a container that hides it
    nccl = "none"
    if torch.distributed.is_nccl_available():
        from torch.cuda.nccl import version as nccl_version

        nccl = ".".join(map(str, nccl_version()))
    yield "torch's libraries", f"CUDA {torch.version.cuda or torch.version.hip}, NCCL {nccl}"


def _deepspeed() -> Iterator[str]:
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    compiled = sorted({file.stem for file in Path(folder).rglob("*.so")})
    installed = [name for name, present in installed_ops.items() if present]
    yield f"operators installed: {', '.join(installed) or 'none'}"
    yield f"compiled at first use: {', '.join(compiled) or 'none'}"


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    container = f", {_size(int(limit))} for this container" if limit.isdigit() else ""
    return f"{_size(total)}{container}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of a checkout, with "-dirty" where it has changes; "" for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    described = _output("git", "-C", str(root), "describe", "--always", "--dirty")
    return f", commit {described.strip()}" if described else ""


def _tool(name: str, flag: str) -> str:
    numbers = re.findall(r"\d+(?:\.\d+)+", _output(name, flag))
    return numbers[0] if numbers else "not found"


def _output(*words: str) -> str:
    """What a command prints; "" where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return ""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _works(state: str) -> bool:
    return state != "not installed" and "cannot be imported" not in state


def _reason(error: Exception) -> str:
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def _table(title: str, rows: dict[str, str]) -> str:
    cells = [
        f"| {name} | {' '.join(text.split()).replace('|', chr(92) + '|')} |"
        for name, text in rows.items()
    ]
    return "\n".join([f"### {title}", "", "| | |", "| --- | --- |", *(cells or ["| none | |"])])

"""Let the CUDA build of torch 2.6 import without the CUDA libraries, which are gigabytes and unused on a CPU.

Each missing library becomes a link to one that torch ships, and Python loads extension modules with lazy binding: a
function of CUDA is then looked for when it is called, which happens on a GPU only. A CPU build of torch is left as it is.
"""

import importlib.util
import sysconfig
from pathlib import Path

LIBRARIES = (
    *("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.9", "libcufft.so.11", "libcurand.so.10"),
    *("libcusparse.so.12", "libcusparseLt.so.0", "libnccl.so.2"),
)
LAZY_BINDING = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n"


def main() -> None:
    """Make the links in torch's folder of libraries, and the file with which Python begins."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise SystemExit("torch is not installed in this environment.")
    folder = Path(found.origin).parent / "lib"
    if not (folder / "libtorch_cuda.so").exists():
        return
    for name in LIBRARIES:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to("libc10.so")
    (Path(sysconfig.get_path("purelib")) / "torch_without_cuda.pth").write_text(LAZY_BINDING)


if __name__ == "__main__":
    main()

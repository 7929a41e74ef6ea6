"""Builds and installs fairseq-lrn. Where the operators cannot be compiled, the package runs without them."""

import importlib.util
import os
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit("fairseq-lrn compiles against PyTorch: install torch, then pip install --no-build-isolation .")


class OptionalBuild(BuildExtension):
    """Lets an installation go on without the extension, but not ``setup.py build_ext``."""

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:
            if "build_ext" in sys.argv:
                raise
            self.extensions = []
            print(
                f"WARNING: fairseq-lrn is installed WITHOUT its compiled operators and will be slow: {error}"
                + "\n(FAIRSEQ_LRN_CUDA=0 compiles those for the CPU alone)" * cuda,
                file=sys.stderr,
            )


class FreshBuild(build_py):
    """Installs the modules of this tree, not also those of older trees, which build/lib* keeps."""

    def run(self):
        shutil.rmtree(os.path.join(self.build_lib, "fairseq_lrn"), ignore_errors=True)
        super().run()


def build_cuda():
    """Whether to compile the CUDA kernels: where that is possible, unless FAIRSEQ_LRN_CUDA says 1 or 0.

    They are compiled for TORCH_CUDA_ARCH_LIST, by default for the cards of this machine.
    """
    wish = os.environ.get("FAIRSEQ_LRN_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"FAIRSEQ_LRN_CUDA must be 0, 1 or not set, but is {wish!r}")
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    version = subprocess.check_output([nvcc, "--version"], text=True) if os.path.exists(nvcc) else ""
    major = str(torch.version.cuda).split(".")[0]
    needs = {
        "a PyTorch built for CUDA": torch.version.cuda is not None,
        f"nvcc of CUDA {major} (on the PATH, or in CUDA_HOME)": f"release {major}." in version,
        "a CUDA card or TORCH_CUDA_ARCH_LIST": "TORCH_CUDA_ARCH_LIST" in os.environ
        or torch.cuda.is_available(),
    }
    missing = ", ".join(need for need, there in needs.items() if not there)
    if wish == "1" and missing:
        sys.exit(f"FAIRSEQ_LRN_CUDA=1, but to compile the CUDA kernels this lacks: {missing}")
    return wish != "0" and not missing


requirements = ["torch>=2.4", "numpy", "sacrebleu", "sentencepiece"]
# Two distributions provide the package `fairseq`; one that is there, whatever its name, is kept.
# A folder that merely has that name, such as a clone of fairseq's repository, has no origin.
fairseq = importlib.util.find_spec("fairseq")
if fairseq is None or fairseq.origin is None:
    requirements.append("fairseq-fixed==0.12.3.1" if sys.version_info >= (3, 11) else "fairseq==0.12.2")

compile_args = ["-O3", "-g0", "-ffp-contract=fast", "-fno-trapping-math"]
link_args = []
if sys.platform == "linux":
    # Only compiled with OpenMP, not linked: its functions come from the runtime that PyTorch has loaded.
    compile_args.append("-fopenmp")
    link_args.append("-s")

cuda = build_cuda()
setup(
    install_requires=requirements,
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "fairseq_lrn._C",
            sorted(glob("fairseq_lrn/csrc/*.cpp") + glob("fairseq_lrn/csrc/*.cu") * cuda),
            depends=sorted(glob("fairseq_lrn/csrc/*.h") + glob("fairseq_lrn/csrc/*.cuh")),
            extra_compile_args={"cxx": compile_args, "nvcc": ["-O3"]},
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild, "build_py": FreshBuild},
)

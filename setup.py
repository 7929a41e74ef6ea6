"""Builds and installs fairseq-lrn. Where the operators cannot be compiled, the package runs without them."""

import importlib.util
import sys
from glob import glob

from setuptools import find_packages, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
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
                f"WARNING: fairseq-lrn is installed WITHOUT its compiled operators and will be slow: {error}",
                file=sys.stderr,
            )


requirements = ["torch>=2.4", "numpy", "sacrebleu", "sentencepiece"]
# Two distributions provide the package `fairseq`; one that is there, whatever its name, is kept.
if importlib.util.find_spec("fairseq") is None:
    requirements.append("fairseq-fixed==0.12.3.1" if sys.version_info >= (3, 11) else "fairseq==0.12.2")

compile_args = ["-O3", "-g0", "-ffp-contract=fast", "-fno-trapping-math"]
link_args = []
if sys.platform == "linux":
    # Only compiled with OpenMP, not linked: its functions come from the runtime that PyTorch has loaded.
    compile_args.append("-fopenmp")
    link_args.append("-s")

setup(
    name="fairseq-lrn",
    version="0.1.0",
    description="Lightweight Recurrent Network (Zhang and Sennrich, ACL 2019) as a fairseq plugin",
    author="The fairseq-lrn authors",
    license="MIT",
    python_requires=">=3.8",
    install_requires=requirements,
    packages=find_packages(include=["fairseq_lrn", "fairseq_lrn.*"]),
    ext_modules=[
        CppExtension(
            "fairseq_lrn._C",
            sorted(glob("fairseq_lrn/csrc/*.cpp")),
            depends=sorted(glob("fairseq_lrn/csrc/*.h")),
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)

"""What setup.cfg cannot say: the shipped model, which stands in models/pylib of a checkout, is data of the wheel (`privinf/shipped.py`)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MODEL = Path(__file__).with_name("models") / "pylib"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


class WithModel(build_py):
    """Copies it beside the package's modules. An editable installation has it where it is, and an image may be built without it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not MODEL.is_dir():
            return
        target = Path(self.build_lib, "privinf", MODEL.name)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(MODEL / name, target / name)


setup(cmdclass={"build_py": WithModel})

"""The README's example does what it says."""

import os
import pathlib
import re

import pytest

pytest.importorskip("torch")
README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_readme(tmp_path):
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
        assert len(code.strip().splitlines()) <= 10
        exec(compile(code, "README.md", "exec"), {})
        assert (tmp_path / "past.safetensors").exists()
    finally:
        os.chdir(before)

"""compat.install, in processes of their own: it is about what `import flash_attn` means there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, path: Path | None = None) -> str:
    paths = os.pathsep.join(str(p) for p in (path, ROOT) if p is not None)
    environment = os.environ | {"PYTHONPATH": paths}
    code = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_flash_attn_is_ours() -> None:
    run("""
        import importlib.util, sys
        import fastattn, fastattn.compat
        installed = fastattn.compat.install("flash_attn")
        import flash_attn
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, flash_attn_qkvpacked_func
        from flash_attn.flash_attn_interface import flash_attn_kvpacked_func, flash_attn_varlen_kvpacked_func
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
        from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
        import flash_attn.layers.rotary as rotary
        assert flash_attn_func is fastattn.flash_attn_func and rotary.RotaryEmbedding is RotaryEmbedding
        assert flash_attn.__version__ == f"2.8.3+fastattn.{fastattn.__version__}"
        spec = importlib.util.find_spec("flash_attn")
        assert spec.origin == "fastattn" and spec.submodule_search_locations == []
        assert importlib.util.find_spec("flash_attn.layers.rotary") is not None
        try:
            import flash_attn.losses
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError
        assert fastattn.compat.install().name == "flash_attn"  # again: nothing happens
        installed.uninstall()
        assert not any(name.startswith("flash_attn") for name in sys.modules)
        assert importlib.util.find_spec("flash_attn") is None
        with fastattn.compat.install("flash_attn_interface"):
            import flash_attn_interface
            assert flash_attn_interface.flash_attn_func is fastattn.fa3.flash_attn_func
            assert flash_attn_interface.__version__.startswith("3.0.0+fastattn")
        assert "flash_attn_interface" not in sys.modules
        try:
            fastattn.compat.install("flashinfer")
        except ValueError as error:
            assert "expected one of 'flash_attn', 'flash_attn_interface'" in str(error)
        else:
            raise AssertionError
    """)


def test_a_real_one_is_replaced_by_force_only(tmp_path: Path) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    (package / "bert_padding.py").write_text("real = True\n")
    program = """
        import sys
        import fastattn.compat
        for word in ("installed", "imported"):
            try:
                fastattn.compat.install("flash_attn")
            except RuntimeError as error:
                assert f"flash_attn is {word}, expected that it is not; force=True" in str(error)
            else:
                raise AssertionError
            import flash_attn.bert_padding
        real = flash_attn
        with fastattn.compat.install("flash_attn", force=True):
            import flash_attn, flash_attn.bert_padding
            assert not hasattr(flash_attn, "real") and not hasattr(sys.modules["flash_attn.bert_padding"], "real")
        import flash_attn
        assert flash_attn is real and sys.modules["flash_attn.bert_padding"].real
    """
    run(program, tmp_path)


def test_what_reads_distribution_metadata_still_says_no() -> None:
    """As documented: transformers looks for a distribution named flash-attn, and there is none."""
    run("""
        import fastattn.compat
        fastattn.compat.install("flash_attn")
        fastattn.compat.install("flash_attn_interface")
        from transformers.utils import is_flash_attn_2_available
        from transformers.utils.import_utils import is_flash_attn_3_available
        assert not is_flash_attn_2_available() and not is_flash_attn_3_available()
    """)


def test_import_stays_light() -> None:
    """Nobody pays for integrations that they do not use."""
    run("""
        import sys
        import fastattn
        assert "torch" not in sys.modules
        fastattn.flash_attn_func, fastattn.sdpa, fastattn.cupy, fastattn.fa3, fastattn.compat
        heavy = {"transformers", "cupy", "fastattn.engine", "fastattn.models", "fastattn.nn"} & set(sys.modules)
        assert not heavy, heavy
        assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
        names = [name for name in dir(fastattn) if getattr(fastattn, name) is None]
        assert not names
    """)

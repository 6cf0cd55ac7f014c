"""Muon is imported without torch's compiler where that saves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from plad_dist.compat.muon import import_muon
import_muon(compiled=sys.argv[1] == "True")
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5 as function
print(json.dumps(["torch._inductor.compile_fx" in sys.modules, hasattr(function, "_torchdynamo_orig_callable"),
                  os.environ.get("TORCHDYNAMO_DISABLE")]))
"""


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("switch", [None, "0"])
def test_torchs_compiler_is_imported_only_if_muon_is_compiled(compiled: bool, switch: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= {} if switch is None else {"TORCHDYNAMO_DISABLE": switch}
    command = [sys.executable, "-c", PROGRAM, str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    has_compiler, is_compiled, switch_after = json.loads(done.stdout.splitlines()[-1])
    assert (has_compiler, is_compiled, switch_after) == (compiled, compiled, switch)

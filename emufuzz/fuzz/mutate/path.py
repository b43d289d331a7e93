"""Exit paths: knobs and events of the machine around the emulator, and the same registers on another path."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import msgspec

from emufuzz.case.model import Case
from emufuzz.fuzz.generate import HLT
from emufuzz.fuzz.kvm.generate import on_path, possible_paths
from emufuzz.fuzz.kvm.recipes import RECIPES
from emufuzz.fuzz.kvm.select import chosen_plans
from emufuzz.fuzz.kvm.spice import season
from emufuzz.fuzz.mutate.base import Scope, with_extra
from emufuzz.fuzz.mutate.instruction import encoded
from emufuzz.fuzz.mutate.mode import moved, places
from emufuzz.fuzz.mutate.operands import tamed

#: What a path's own exit is made of, so that another value is another exit.
_EXIT: Final = ("exit_reason", "exit_qualification", "instruction_info", "instruction_length")
#: Members of `kvm` of which one entry can go.
_MAPS: Final = ("knobs", "lapic")


def other_knobs(case: Case, rng: Random) -> Case | None:
    """Something more of the machine: a knob, an event, debugging, a nested guest; or one thing less."""
    if case.path is None:
        return None
    kvm = _copied((case.extra or {}).get("kvm") or {})
    needed = {*_EXIT, "knobs"} if "lapic" in kvm else set(_EXIT)
    spare = [name for name in kvm if name not in needed]
    if spare and rng.random() < 0.3:
        name = rng.choice(sorted(spare))
        inner = kvm[name]
        if isinstance(inner, dict) and len(inner) > 1 and name in _MAPS:
            del inner[rng.choice(sorted(inner))]
        else:
            del kvm[name]
    else:
        case = season(rng, case, kvm, 1.0)
    return with_extra(case, "kvm", kvm)


def _copied(kvm: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in kvm.items()}


def other_path(case: Case, rng: Random, scope: Scope) -> Case | None:
    """Another exit path, or another scene of the same one, with an instruction that leads there."""
    paths = possible_paths(scope.paths, scope.modes)
    if case.path is None or not paths:
        return None
    path = rng.choice(paths)
    recipe = RECIPES[path]
    mode = rng.choice([mode for mode in scope.modes if mode in recipe.modes])
    usable = [env for env in places(mode) if recipe.usable(env)] or list(places(mode))
    scene = rng.choice(recipe.scenes)(rng, rng.choice(usable))
    env = scene.env
    plan = rng.choice(chosen_plans(rng.choice(recipe.kinds), env.bits))
    code = encoded(rng, env.bits, plan)._replace(rest=HLT).bytes()
    fresh = msgspec.structs.replace(
        case, code=code, count=1, path=path, extra=None, port_in=b"", vendor="intel", emul_type=0
    )
    return on_path(rng, path, scene, tamed(moved(fresh, rng, env), rng))

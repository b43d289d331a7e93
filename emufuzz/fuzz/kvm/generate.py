"""Generated cases of exit paths: numbered batches, like those of `emufuzz.fuzz.generate`.

A batch is made of runs. A run has one path and one scene; its instructions come from the opcode
tables, and are then given what the path needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.case.model import Case
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.environments import Environment
from emufuzz.fuzz.generate import Generator, Options
from emufuzz.fuzz.kvm.recipes import RECIPES, Recipe
from emufuzz.fuzz.kvm.scenes import Scene
from emufuzz.fuzz.kvm.select import chosen_plans
from emufuzz.fuzz.kvm.spice import season

#: Instructions that share a scene.
RUN: Final = 16


@dataclass(frozen=True, slots=True)
class PathOptions(Options):
    """What a campaign against KVM's exit paths generates; `paths` are some of PATHS, in their order."""

    paths: tuple[str, ...] = PATHS


def possible_paths(paths: tuple[str, ...], modes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `paths` that exist in one of the modes."""
    return tuple(path for path in paths if set(RECIPES[path].modes) & set(modes))


def generator_of(seed: int, number: int, options: Options) -> Generator:
    """The generator of batch `number`: of exit paths if the options name some."""
    if isinstance(options, PathOptions):
        return PathGenerator(seed, number, options)
    return Generator(seed, number, options)


class PathGenerator(Generator):
    """One batch of exit paths in the making.

    Raises:
        ValueError: None of the paths exists in the modes asked for.
    """

    def __init__(self, seed: int, number: int, options: PathOptions) -> None:
        super().__init__(seed, number, options)
        self._paths = possible_paths(options.paths, options.modes)
        if not self._paths:
            raise ValueError(f"no path of {', '.join(options.paths)} exists in {', '.join(options.modes)}")
        self._usable = {path: self._environments_of(RECIPES[path]) for path in self._paths}

    def _environments_of(self, recipe: Recipe) -> list[Environment]:
        """The environments of the modes that the path exists in; all of those if none suits."""
        those = [env for envs in self._environments for env in envs if env.mode in recipe.modes]
        return [env for env in those if recipe.usable(env)] or those

    def cases(self, size: int) -> list[Case]:
        """The first `size` cases."""
        cases, rng = self._cases, self._rng
        while len(cases) < size:
            path = rng.choice(self._paths)
            self._run_of(path, RECIPES[path])
        del cases[size:]
        return cases

    def _run_of(self, path: str, recipe: Recipe) -> None:
        rng, cases = self._rng, self._cases
        scene = rng.choice(recipe.scenes)(rng, rng.choice(self._usable[path]))
        tables = [chosen_plans(kind, scene.env.bits) for kind in recipe.kinds]
        for _ in range(RUN):
            table = rng.choice(tables)
            first = len(cases)
            self._instruction(scene.env, rng.choice(table), rng.getrandbits(50))
            for i in range(first, len(cases)):
                cases[i] = on_path(rng, path, scene, cases[i])


def on_path(rng: Random, path: str, scene: Scene, case: Case) -> Case:
    """The case with its path, its devices, and the machine around it."""
    recipe = RECIPES[path]
    kvm: dict[str, Any] = {**scene.kvm}
    if "knobs" in kvm:
        kvm["knobs"] = {**kvm["knobs"]}
    case = msgspec.structs.replace(case, path=path)
    for finish in recipe.finish:
        case = finish(rng, scene, case, kvm)
    case = season(rng, case, kvm, recipe.spice)
    extra = {**scene.extra, "kvm": kvm} if kvm else {**scene.extra}
    return msgspec.structs.replace(case, extra=extra or None)

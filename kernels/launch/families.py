"""The device families: which devices are one, and whose table each reads."""

from __future__ import annotations

# The oldest compute capability of each family: a device belongs to the last family that is not newer than it.
FAMILIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120"}
# sm_86 has the instructions of sm_80 but the shared memory of sm_89 (99 KB), which is what decides a configuration.
TABLES = {"sm_80": "sm_80", "sm_86": "sm_89", "sm_89": "sm_89", "sm_90": "sm_90", "sm_100": "sm_100", "sm_120": "sm_120"}
# Of the card that stands for a family where there is none, by NVIDIA's data sheets: those of tools/cards.py.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}


def family_of_capability(capability: tuple[int, int]) -> str:
    """The device family of a compute capability, e.g. ``(9, 0)`` -> ``"sm_90"``; ValueError below 8.0."""
    older = [family for oldest, family in FAMILIES.items() if oldest <= tuple(capability)]
    if not older:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer")
    return older[-1]

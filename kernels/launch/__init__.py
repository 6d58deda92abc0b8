"""What every op shares at launch.

    checks      what an op asks of its arguments, and how it takes them
    devices     which tensors run kernels, and the family of their device
    table       the configuration table
    call        the launch itself
    plans       what an op does to tensors of a form, worked out once; written: as a function of Python
    recording   what would be launched, for the tools

An op says ``from . import launch`` and ``launch.autocast``, ``launch.config``, ``launch.launch``: the names below are all there is to know.
"""

from .call import launch
from .checks import (
    DTYPES,
    MAX_SIDE,
    autocast,
    check_input,
    check_map,
    check_operand,
    check_size,
    check_tensor,
    check_vector,
    describable,
    input_precision,
    product_dtype,
)
from .devices import INTERPRETED, INTERPRETED_FAMILY_VARIABLE, device_family, has_kernels, multiprocessors, only, runs_kernels, stand_ins
from .families import FAMILIES, MULTIPROCESSORS, TABLES, family_of_capability
from .plans import implementation, planned, without_plans
from .recording import CompileCase, distinct, record
from .table import CONFIGS, config, forget_choices, forget_tables, load_table, overridden, select, using

__all__ = [
    "CONFIGS",
    "CompileCase",
    "DTYPES",
    "FAMILIES",
    "INTERPRETED",
    "INTERPRETED_FAMILY_VARIABLE",
    "MAX_SIDE",
    "MULTIPROCESSORS",
    "TABLES",
    "autocast",
    "check_input",
    "check_map",
    "check_operand",
    "check_size",
    "check_tensor",
    "check_vector",
    "config",
    "describable",
    "device_family",
    "distinct",
    "family_of_capability",
    "forget_choices",
    "forget_tables",
    "has_kernels",
    "implementation",
    "input_precision",
    "launch",
    "load_table",
    "multiprocessors",
    "only",
    "overridden",
    "planned",
    "product_dtype",
    "record",
    "runs_kernels",
    "select",
    "stand_ins",
    "using",
    "without_plans",
]

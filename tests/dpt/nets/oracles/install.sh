#!/bin/sh
# A virtual environment for the oracles, all but mmsegmentation's: install.sh FOLDER [REQUIREMENT...], where a requirement replaces what
# requirements.txt says. Then, from the root of this repository, FOLDER/bin/python -m tests.dpt.nets.oracles.NAME ...
set -e
folder=${1:?the folder of the new environment}
shift
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --no-deps --requirement "$(dirname "$0")/requirements.txt"
[ $# = 0 ] || "$folder/bin/python" -m pip install --quiet --no-deps "$@"

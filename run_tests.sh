#!/usr/bin/env bash
# Runs the tests, in an environment that it sets up first if need be. Arguments go to pytest: ./run_tests.sh tests/test_config.py -x
# CHUNKFLOW_PYTHON=python uses that interpreter as it is: nothing is installed, and what it lacks is told.
set -e

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$REPO/.ci/environment.sh" test
cd "$REPO"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests run side by side
exec "$PYTHON" -m pytest "$@"

#!/usr/bin/env bash
# The whole table on a machine with one GPU, in about two hours:
#   bash benchmarks/gpu/run_all.sh gsm8k_train.jsonl [RESULTS_FOLDER]
# PYTHON names the interpreter (default: python). A comparison that fails is recorded, and the next one begins.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

data=$1
results=${2:-benchmarks/results}
python=${PYTHON:-python}

compare() { # WORKLOAD OURS PEER [OPTION ...]
    echo "== $*"
    "$python" benchmarks/gpu/compare.py "$1" --ours "$2" --peer "$3" "${@:4}" --data "$data" --out "$results/$1.jsonl"
}

for workload in w1 w2 w3 w4; do
    compare $workload default hf_trainer:default
    compare $workload tuned hf_trainer:best
    compare $workload tuned trl_sft:default
    compare $workload tuned plain_loop:default
done
compare w4 tuned hf_trainer:best --epoch
"$python" benchmarks/gpu/table.py "$results"

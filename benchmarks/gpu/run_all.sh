#!/usr/bin/env bash
# The whole table: the sweep, the comparisons, what each level gains, and planned against measured memory, generation, and serving. About four hours on one GPU; where there are
# several, each takes its share, one job at a time.
#   bash benchmarks/gpu/run_all.sh gsm8k_train.jsonl [RESULTS_FOLDER]
# PYTHON names the interpreter (default: python). A job that fails is recorded, and the next one begins.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

data=$1
results=${2:-benchmarks/results}
python=${PYTHON:-python}
gpus=$(nvidia-smi --list-gpus | wc -l)

jobs=()
for workload in w1 w2 w3 w4; do
    jobs+=("compare.py $workload --ours default --peer hf_trainer:default --out $results/$workload.jsonl"
        "compare.py $workload --ours tuned --peer hf_trainer:best --out $results/$workload.jsonl"
        "compare.py $workload --ours tuned --peer trl_sft:default --out $results/$workload.jsonl"
        "compare.py $workload --ours tuned --peer plain_loop:default --out $results/$workload.jsonl"
        "sweep.py $workload --minutes 15 --out $results/sweep.jsonl"
        "levels.py $workload --out $results/levels.jsonl")
done
jobs+=("compare.py w4 --epoch --ours tuned --peer hf_trainer:best --out $results/w4.jsonl"
    "compare.py w1 --ours tuned --peer hf_trainer:compile+bf16w --out $results/w1.jsonl"
    "compare.py w2 --ours tuned --peer hf_trainer:liger+bf16w+rows=8 --out $results/w2.jsonl"
    "memory.py --models w1 --out $results/memory.jsonl"
    "memory.py --models w2 --out $results/memory.jsonl"
    "memory.py --models w3 --out $results/memory.jsonl"
    "ballast.py --out $results/ballast.jsonl"
    "generation.py --out $results/generate.jsonl"
    "serving.py --out $results/serving.jsonl"
    "paged_kernel.py --json $results/paged_kernel.jsonl")

work() { # GPU: every job whose turn it is
    local index documents
    for ((index = $1; index < ${#jobs[@]}; index += gpus)); do
        echo "== GPU $1: ${jobs[index]}"
        documents=(--data "$data")
        [[ ${jobs[index]} =~ ^(memory|ballast|generation|serving|paged_kernel)\.py ]] && documents=() # it reads none
        # shellcheck disable=SC2086  # a job is a line of words
        CUDA_VISIBLE_DEVICES=$1 "$python" benchmarks/gpu/${jobs[index]} ${documents[@]+"${documents[@]}"}
    done
}

for ((gpu = 0; gpu < gpus; gpu++)); do
    work "$gpu" &
done
wait
"$python" benchmarks/gpu/table.py "$results"

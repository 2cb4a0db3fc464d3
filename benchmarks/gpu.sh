#!/usr/bin/env bash
# All figures that need a GPU, in one run of at most ten minutes; one table at the end.
#
#     benchmarks/gpu.sh COMPETITION [PYTHON]
#
# COMPETITION is the folder of the whole competition. Measures the whole command, cold, with its default network, twice
# more with other seeds, the average of the three, the light network, and training speed beside the reference.
set -euo pipefail
competition=$(realpath "$1")
python=${2:-python}
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
deadline=$((SECONDS + 600))

# measure NAME MODULE ARGUMENT...: run a benchmark in what is left of the ten minutes; its last lines go to the table.
measure() {
    local name=$1 left=$((deadline - SECONDS)) status=0
    shift
    echo "== $name: python -m benchmarks.$*"
    if [ "$left" -lt 10 ]; then
        echo "$name|not measured: the ten minutes are over" >>"$folder/table"
        return
    fi
    timeout "$left" "$python" -m "benchmarks.$@" >"$folder/log" 2>"$folder/errors" || status=$?
    cat "$folder/log"
    [ "$status" = 0 ] || tail -n 3 "$folder/errors"
    { [ "$status" = 0 ] || echo "ended with status $status"
      grep -E '^(80|85) %|^whole command|^averaging|probabilities|median|peak memory' "$folder/log" || true
    } | sed "s/^ */$name|/" >>"$folder/table"
}

for seed in 0 1 2; do
    measure "resnet, seed $seed" time_to_accuracy --data-dir "$competition" --model resnet --seed "$seed" \
        --output-dir "$folder/resnet$seed"
done
measure "resnet, three averaged" ensemble "$folder"/resnet{0,1,2}/best_model.pth --data-dir "$competition" \
    --cache-dir "$folder/cache"
measure "resnet, speed" throughput --data-dir "$competition" --cache-dir "$folder/cache" --models resnet --seconds 8
measure "resnet, speed, batch 1024" throughput --data-dir "$competition" --cache-dir "$folder/cache" --models resnet \
    --seconds 5 --batch-size 1024 --rounds 2
measure "resnet, speed, batch 1024, compiled" throughput --data-dir "$competition" --cache-dir "$folder/cache" \
    --models resnet --seconds 5 --batch-size 1024 --rounds 2 --compile
measure "resnet, one rank of torchrun beside none" ranks --data-dir "$competition" --nproc-per-node 1 --model resnet \
    --rows 20000 --rounds 2
measure "cnn, seed 0" time_to_accuracy --data-dir "$competition" --model cnn
measure "cnn, speed" throughput --data-dir "$competition" --cache-dir "$folder/cache" --models cnn --seconds 8

echo
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || echo "no NVIDIA GPU: another device's figures"
"$python" -c 'import torch, platform; print("torch", torch.__version__, "python", platform.python_version())'
echo "| what | figure |"
echo "|---|---|"
sed 's/|/ | /; s/^/| /; s/$/ |/' "$folder/table"

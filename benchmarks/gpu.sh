#!/usr/bin/env bash
# Measure all figures that need a GPU in one run of at most ten minutes, and print one table at the end. Figures for which
# no time was left are listed as not measured.
#
#     benchmarks/gpu.sh COMPETITION [PYTHON]
#
# COMPETITION is the folder of the whole competition. Measured are the whole command with an empty cache, with its default
# network and at 32 pixels in batches of 1,024; the training speed beside the reference; the light network; the default
# network with two other seeds; and the average of the three.
set -euo pipefail
competition=$(realpath "$1")
python=$(realpath -s "$(command -v "${2:-python3}")")
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # several GPUs would share each batch
trap 'rm -rf "$folder"' EXIT
deadline=$((SECONDS + 570))  # ten minutes without the seconds that the table takes

# measure NAME MODULE ARGUMENT...: run a benchmark in the time that is left, and add its last lines to the table.
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
    { if [ "$status" != 0 ]; then
          echo "ended with status $status"  # 124: no time was left
          grep -E '^\[.*\] epoch ' "$folder/log" | tail -n 1 || true
      fi
      grep -E '^(80|85) %|^whole command|^averaging|probabilities|median|peak memory' "$folder/log" || true
    } | sed "s/^ */$name|/" >>"$folder/table"
}

# resnet SEED: the whole command with the default network, keeping its checkpoint for the average.
resnet() {
    measure "resnet, seed $1" time_to_accuracy --data-dir "$competition" --model resnet --seed "$1" \
        --output-dir "$folder/resnet$1"
}

resnet 0
measure "resnet, 32 pixels, batch 1024" time_to_accuracy --data-dir "$competition" --model resnet --image-size 32 \
    --batch-size 1024 --learning-rate 4e-3
measure "resnet, speed" throughput --data-dir "$competition" --cache-dir "$folder/cache" --models resnet --seconds 8
measure "resnet, speed, batch 1024" throughput --data-dir "$competition" --cache-dir "$folder/cache" --models resnet \
    --seconds 5 --batch-size 1024 --rounds 2
measure "cnn, speed" throughput --data-dir "$competition" --cache-dir "$folder/cache" --models cnn --seconds 8
measure "cnn, seed 0" time_to_accuracy --data-dir "$competition" --model cnn
measure "resnet, one rank of torchrun beside none" ranks --data-dir "$competition" --nproc-per-node 1 --model resnet \
    --rows 20000 --rounds 2
measure "resnet, speed, batch 1024, compiled" throughput --data-dir "$competition" --cache-dir "$folder/cache" \
    --models resnet --seconds 5 --batch-size 1024 --rounds 2 --compile
resnet 1
resnet 2
measure "resnet, three averaged" ensemble "$folder"/resnet{0,1,2}/best_model.pth --data-dir "$competition" \
    --cache-dir "$folder/cache"

echo
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || echo "no NVIDIA GPU: the figures are of another device"
"$python" -c 'import torch, platform; print("torch", torch.__version__, "python", platform.python_version())' || true
echo "| what | figure |"
echo "|---|---|"
sed 's/|/ | /; s/^/| /; s/$/ |/' "$folder/table"

#!/usr/bin/env bash
# Pretrain, judge and compare one BYOL recipe. Stopped at any point, it goes on where it was.
# Arguments: RECIPE [SOURCE [RUN [FLAGS of byol.pretrain]]]; without SOURCE, the recipe's own data.
#
#   bash byol/reproduce.sh demo
#   bash byol/reproduce.sh cifar10 uoft-cs/cifar10 runs/byol-cifar10 --seed 2
#   LAUNCH="accelerate launch --num_processes 8 -m" bash byol/reproduce.sh imagenet ILSVRC/imagenet-1k
set -euo pipefail
recipe=${1:-demo}
run=${3:-runs/byol-$recipe}
launch=${LAUNCH:-python -m}

# a judgement that is there is not repeated, unless the encoder is newer
once() {
    [ "$(find "$run/results" -name "$1-????????.json" -newer "$run/encoder.safetensors" 2>/dev/null)" ] ||
        "${@:2}"
}

$launch byol.pretrain "$recipe" ${2:+--data "$2"} --out "$run" "${@:4}"
if [ "$recipe" = demo ]; then # small enough for one thread, and for the floor and the ceiling beside it
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    once finetune-simclr-100-random python -m eval \
        knn "$run" --baselines pixels random -- \
        linear "$run" --protocol features --baselines pixels random -- \
        finetune "$run" --weights random --epochs 20 --base-lr 0.2
else
    once knn-weighted-k200-encoder python -m eval.knn "$run"
    once linear-byol-encoder python -m eval.linear "$run"
fi
python -m eval.compare "$run"

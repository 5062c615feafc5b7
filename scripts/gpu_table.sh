#!/usr/bin/env bash
# One row of the CIFAR-10 table, end to end, inside a budget of time.
#
#   scripts/gpu_table.sh ROW SECONDS [key=value ...]
#
# ROW is float, or a scheme such as w4a4, w3a3, w2a2: the float row trains ResNet-20 from scratch, the
# others start from its checkpoint (or ckpt=PATH) and train quantized. Two short runs are timed first;
# then as many epochs as the budget has room for are trained, at most EPOCHS (200 float, 100 quantized).
# The report lies in runs/cifar_resnet20_ROW/; its row is added to recipes/cifar10.md.
#
#   scripts/gpu_table.sh float 1500
#   scripts/gpu_table.sh w2a2 1500 quantizer=ewgs seed=1
#   scripts/gpu_table.sh w4a4 600 data=arrays data.path=cifar10.npz ckpt=resnet20.th
set -euo pipefail

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 2 ] && [ "$2" -gt 0 ] 2>/dev/null || usage
row=$1 budget=$2
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
begin=$(date +%s)
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "")')
fast=()
[ -z "$device" ] || fast=(data.device=cuda compile=step trainer.precision=bf16-mixed)

if [ "$row" = float ]; then
  key=schedule.float_epochs most=${EPOCHS:-200}
  fixed=(scheme=w8a8 schedule.epochs=0 distillation=none)
else
  key=schedule.epochs most=${EPOCHS:-100}
  fixed=("scheme=$row")
  if [[ " $* " != *" ckpt="* ]]; then
    float=$(ls -d runs/cifar_resnet20_float/*/checkpoints/last.ckpt 2>/dev/null | tail -1)
    [ -n "$float" ] || { echo "expected a float checkpoint: run $0 float SECONDS first, or give ckpt=PATH" >&2; exit 1; }
    fixed+=("ckpt='$float'" optimizer.rates.qat_lr=0.02) # the recipe's, which suits its own float model
  fi
fi

train() { # NAME EPOCHS: prints the seconds that it took
  local start
  start=$(date +%s)
  "$python" train.py recipe=cifar_resnet20 "${fixed[@]}" "${fast[@]}" callbacks.progress=null "name=$1" "$key=$2" "${@:3}" >&2
  echo $(($(date +%s) - start))
}

one=$(train cifar_timing 1 "$@")
two=$(train cifar_timing 2 "$@")
epoch=$((two > one ? two - one : 1))
left=$((budget - ($(date +%s) - begin)))
epochs=$(((left - (one - epoch)) * 9 / 10 / epoch)) # a tenth is kept for what takes longer than it should
epochs=$((epochs < most ? epochs : most))
[ "$epochs" -ge 1 ] || { echo "expected a budget with room for an epoch of $epoch s behind two timed runs ($one and $two s), got $budget s: raise it" >&2; exit 1; }
echo "$row: $epoch s an epoch, $epochs epochs in the $left s that are left" >&2
train "cifar_resnet20_$row" "$epochs" "$@" >/dev/null
"$python" scripts/table.py runs/cifar_resnet20_* --marks full --into recipes/cifar10.md

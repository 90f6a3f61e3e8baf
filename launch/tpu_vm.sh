#!/usr/bin/env bash
# Makes a TPU VM, installs this checkout on it, and generates. Run it from the repository root:
#   ZONE=us-east5-b launch/tpu_vm.sh create     # make the VM and install
#   ZONE=us-east5-b launch/tpu_vm.sh run --model demo --prompt "Hello" --max-tokens 48
#   ZONE=us-east5-b launch/tpu_vm.sh delete     # it costs money until then
# Needs gcloud, logged in, with a project and TPU quota in the zone.
set -euo pipefail

NAME=${NAME:-jaxllm}
ZONE=${ZONE:?set ZONE to a zone with TPU quota, such as us-east5-b}
ACCELERATOR=${ACCELERATOR:-v6e-1}
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # the VM image; it goes with the accelerator (v5e: v2-alpha-tpuv5-lite)

remote() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --command "$1"; }

case ${1:-} in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$ACCELERATOR" --version "$RUNTIME"
    source=$(mktemp -t jaxllm.XXXXXX.tar.gz)
    trap 'rm -f "$source"' EXIT
    git archive --format=tar.gz --output "$source" HEAD
    gcloud compute tpus tpu-vm scp "$source" "$NAME:jaxllm.tar.gz" --zone "$ZONE"
    # uv brings the Python 3.12 that the VM's system may lack.
    remote 'set -e; mkdir -p jaxllm && tar -xzf jaxllm.tar.gz -C jaxllm && cd jaxllm
        python3 -m pip install --user --quiet uv && python3 -m uv venv --python 3.12 .venv
        python3 -m uv pip install --python .venv --constraint constraints.txt --editable ".[tpu]"
        .venv/bin/jaxllm doctor'
    ;;
run)
    shift
    remote "cd jaxllm && .venv/bin/jaxllm generate $(printf '%q ' "$@")"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE"
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

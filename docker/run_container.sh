#!/usr/bin/env bash
# Starts the container on all GPUs.
#   ./docker/run_container.sh                  a shell inside, as in the recipe: hf, outrider, lm_eval, curl, jq
#   ./docker/run_container.sh serve MODEL ...  the server
# The hub cache of the host is mounted, so a model is downloaded once; HF_TOKEN is passed on.
#   IMAGE  image to run    (default: outrider:deploy)
#   PORT   port published  (default: 8080)
set -euo pipefail

image=${IMAGE:-outrider:deploy}
port=${PORT:-8080}
cache=${HF_HOME:-${HOME}/.cache/huggingface}
mkdir -p "${cache}"

options=(
    --rm
    --gpus all
    --ipc=host
    --user "$(id -u):$(id -g)"
    --publish "${port}:${port}"
    --volume "${cache}:/cache/huggingface"
    --env HF_TOKEN
    --env "HOST=127.0.0.1"
    --env "PORT=${port}"
)
if [[ -t 0 ]]; then
    options+=(--interactive --tty)
fi
if [[ $# -eq 0 ]]; then
    exec docker run "${options[@]}" --no-healthcheck --name outrider --entrypoint /bin/bash "${image}"
fi
exec docker run "${options[@]}" --name outrider "${image}" "$@"

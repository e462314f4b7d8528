#!/usr/bin/env bash
# Builds the image: ./docker/build_image.sh [extra docker build arguments]
#   IMAGE         tag of the image           (default: outrider:deploy)
#   CUDA_VERSION  tag of nvidia/cuda's base  (default: the Dockerfile's)
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build_args=()
if [[ -n "${CUDA_VERSION:-}" ]]; then
    build_args+=(--build-arg "CUDA_VERSION=${CUDA_VERSION}")
fi

DOCKER_BUILDKIT=1 docker build \
    --file "${repo}/docker/Dockerfile" \
    --target outrider \
    --tag "${IMAGE:-outrider:deploy}" \
    "${build_args[@]}" \
    "$@" \
    "${repo}"

#!/usr/bin/env bash
# Bring the image of this working tree to the cluster of KUBECONFIG, unless it is there; print its name.
#   OSLO_IMAGE_LOAD=path/to/load tests/e2e/image.sh [TAG]
# TAG: default: docker/image-key; any other (`dev`) is brought anew each time. OSLO_IMAGE_LOAD: a command that takes an
# image archive (docker-archive or OCI) and gives it to the nodes; not needed where the context is kind's.
# BASE_IMAGE, EXTRAS: as for `make image`. After a change of code: seconds, with buildah; see image_delta.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=tests/e2e
key=$(docker/image-key ${EXTRAS:+"EXTRAS=$EXTRAS"} ${BASE_IMAGE:+"BASE_IMAGE=$BASE_IMAGE"})
tag=${1:-$key}
image=localhost/opensloth:$tag
say() { echo "image: $*" >&2; }

on_the_nodes() { kubectl get nodes -o jsonpath='{range .items[*].status.images[*]}{.names}{"\n"}{end}' | grep -qF "\"$image\""; }

# The code as a layer of its own, with the bytes that the last COPY of the Dockerfile puts there.
code_layer() { # ARCHIVE.tar
  local c
  BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} buildah bud -q --layers --target code \
    ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"} ${EXTRAS:+--build-arg "EXTRAS=$EXTRAS"} \
    -f docker/train.Dockerfile -t localhost/opensloth-code . >/dev/null
  c=$(buildah from localhost/opensloth-code)
  tar -C "$(buildah mount "$c")/opt/code" --sort=name --owner=0 --group=0 --numeric-owner \
    --transform='flags=r;s,^\.,opt/venv,' -cf "$1" .
  buildah rm "$c" >/dev/null
}

load_with_buildah() {
  local state work
  state=${XDG_CACHE_HOME:-$HOME/.cache}/oslo-e2e/$(kubectl get namespace kube-system -o jsonpath='{.metadata.uid}').json
  work=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
  trap 'rm -rf "$work"' RETURN
  code_layer "$work/layer.tar"
  if python3 $here/image_delta.py write "$image" "$work/layer.tar" "$state" "$work/delta.tar"; then
    if "$OSLO_IMAGE_LOAD" "$work/delta.tar" >"$work/log" 2>&1; then return; fi
  fi
  say "the nodes lack the layers below the code: loading all of it, which takes minutes"
  buildah push -q "$image" "docker-archive:$work/whole.tar:$image" >/dev/null
  "$OSLO_IMAGE_LOAD" "$work/whole.tar" >&2
  python3 $here/image_delta.py record "$work/whole.tar" "$state"
}

exec 9>"${TMPDIR:-/var/tmp}/oslo-image.lock" && flock 9 # tests side by side want the same image
if [[ $tag == "$key" ]] && on_the_nodes; then echo "$image"; exit; fi
make --no-print-directory image IMAGE="$image" ${BASE_IMAGE:+"BASE_IMAGE=$BASE_IMAGE"} ${EXTRAS:+"EXTRAS=$EXTRAS"} >&2
docker=$(docker info >/dev/null 2>&1 && echo yes || echo no)
context=$(kubectl config current-context)
if [[ $context == kind-* && $docker == yes ]]; then
  kind load docker-image --name "${context#kind-}" "$image" >&2
else
  : "${OSLO_IMAGE_LOAD:?the command that gives an image archive to the nodes of the cluster}"
  if [[ $docker == yes ]]; then
    archive=$(mktemp -p "${TMPDIR:-/var/tmp}" --suffix .tar)
    trap 'rm -f "$archive"' EXIT
    docker save -o "$archive" "$image"
    "$OSLO_IMAGE_LOAD" "$archive" >&2
  else
    load_with_buildah
  fi
fi
echo "$image"

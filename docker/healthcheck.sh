#!/bin/sh
# Container health: GET /health on the port that the server (process 1) was told, 8000 without --port.
set -eu
port=$(tr '\0' '\n' <"${CMDLINE:-/proc/1/cmdline}" | awk '
    take { port = $0; take = 0 }
    $0 == "--port" { take = 1 }
    /^--port=/ { port = substr($0, 8) }
    END { print port == "" ? 8000 : port }')
exec curl --fail --silent --show-error --max-time 4 --output /dev/null "http://127.0.0.1:${port}/health"

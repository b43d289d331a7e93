#!/bin/bash -eu
"$SRC/emufuzz/fuzz/build.sh"

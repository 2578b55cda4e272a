# Tells whoever logs in as root how the router is, once: a shell of `pct enter` is no login shell and
# comes here by ~/.bashrc.
case $- in
*i*)
    if [ "$(id -u)" = 0 ] && [ -z "${SLUICE_TOLD-}" ]; then
        SLUICE_TOLD=1
        sluice doctor || true
    fi
    ;;
esac

//! Running the other processor's programs while its system is made.

use std::process::Command;

use crate::package::Arch;
use crate::run;

/// Registers QEMU for the programs of the processor `$1` where nobody has, by the line that QEMU's package brings,
/// for as long as the command runs. In a mount namespace of its own, so that newer kernels forget the handler with
/// it, however that ends.
const WITH_HANDLER: &str = r#"set -eu
handler=qemu-$1; shift
folder=/proc/sys/fs/binfmt_misc
mount -t binfmt_misc binfmt_misc $folder
[ ! -e $folder/$handler ] || exec "$@"
cat /usr/lib/binfmt.d/$handler.conf >$folder/register
status=0
"$@" || status=$?
echo -1 >$folder/$handler
exit $status"#;

/// A command that runs programs of this processor, whichever this machine has.
pub(super) fn command(arch: Arch, program: &str) -> Command {
    if arch == Arch::own() {
        return run::command(program);
    }
    let mut command = run::command("unshare");
    command.args(["--mount", "sh", "-c", WITH_HANDLER, "sh", arch.rust()]);
    command.arg(program);
    command
}

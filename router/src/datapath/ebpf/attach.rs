//! Attaching the programs to the ingress of an interface.

use aya::programs::tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, TcError, tc};

use super::{clsact, errno, failed, refused};
use crate::datapath::{Error, Link};

/// Priority of our clsact filters: behind those of others, as with tcx. (The kernel's own choice
/// begins at 49152 and goes down.)
const PRIORITY: u16 = 50_000;

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// A tcx link: gone with the daemon's file descriptor (Linux 6.6).
    Tcx,
    /// A filter in a clsact qdisc: it stays until it is removed.
    Clsact,
}

impl AttachMode {
    /// The word for `status` and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// A program on an interface.
#[derive(Debug)]
pub(super) struct Attachment {
    program: &'static str,
    link: Link,
    id: SchedClassifierLinkId,
    /// Whether the clsact qdisc is ours too.
    made_qdisc: bool,
}

/// Attaches `program` to the ingress of `link`. While `mode` is open, what works decides it.
pub(super) fn attach(
    programs: &mut aya::Ebpf,
    mode: &mut Option<AttachMode>,
    program: &'static str,
    link: &Link,
    tun: u32,
) -> Result<Attachment, Error> {
    if *mode != Some(AttachMode::Clsact) {
        match attach_tcx(programs, program, link) {
            // Kernels before 6.6 do not know the attach type.
            Err(error) if mode.is_none() && errno(&error) == Some(libc::EINVAL) => {}
            outcome => {
                let id = outcome
                    .map_err(|error| refused(context(program, link, AttachMode::Tcx), error))?;
                *mode = Some(AttachMode::Tcx);
                return Ok(Attachment {
                    program,
                    link: link.clone(),
                    id,
                    made_qdisc: false,
                });
            }
        }
    }
    if mode.is_none() {
        *mode = Some(AttachMode::Clsact);
        tracing::debug!("the kernel has no tcx: programs are attached by clsact");
    }
    attach_clsact(programs, program, link, tun)
}

fn context(program: &str, link: &Link, mode: AttachMode) -> String {
    format!("attach {program} to {} ({})", link.name, mode.label())
}

fn classifier<'a>(
    programs: &'a mut aya::Ebpf,
    name: &str,
) -> Result<&'a mut SchedClassifier, ProgramError> {
    let program = programs.program_mut(name).ok_or(ProgramError::NotLoaded)?;
    program.try_into()
}

fn attach_tcx(
    programs: &mut aya::Ebpf,
    program: &str,
    link: &Link,
) -> Result<SchedClassifierLinkId, ProgramError> {
    // Behind the programs of others: a firewall or a monitor of the operator's goes on to see
    // what it saw.
    classifier(programs, program)?.attach_with_options(
        &link.name,
        TcAttachType::Ingress,
        TcAttachOptions::TcxOrder(LinkOrder::last()),
    )
}

fn attach_clsact(
    programs: &mut aya::Ebpf,
    program: &'static str,
    link: &Link,
    tun: u32,
) -> Result<Attachment, Error> {
    let context = || context(program, link, AttachMode::Clsact);
    let made_qdisc = match tc::qdisc_add_clsact(&link.name) {
        Ok(()) => true,
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => false,
        Err(error) => return Err(refused(context(), error)),
    };
    let options = NlOptions {
        priority: PRIORITY,
        // Tells whose filter it is, should the daemon die.
        handle: tun.into(),
        classid: None,
    };
    let attached = classifier(programs, program).and_then(|classifier| {
        classifier.attach_with_options(
            &link.name,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(options),
        )
    });
    match attached {
        Ok(id) => Ok(Attachment {
            program,
            link: link.clone(),
            id,
            made_qdisc,
        }),
        Err(error) => {
            if made_qdisc && let Err(error) = clsact::remove_if_empty(link.index) {
                tracing::warn!(%error, link = %link.name, "an empty clsact qdisc is left");
            }
            Err(refused(context(), error))
        }
    }
}

impl Attachment {
    /// Detaches the program. That the interface is gone already is no error.
    pub(super) fn detach(self, programs: &mut aya::Ebpf) -> Result<(), Error> {
        let context = || format!("detach {} from {}", self.program, self.link.name);
        let detached = classifier(programs, self.program).and_then(|p| p.detach(self.id));
        match detached {
            Err(error) if !is_gone(errno(&error)) => return Err(failed(context(), error)),
            _ => {}
        }
        if self.made_qdisc {
            clsact::remove_if_empty(self.link.index).map_err(|error| failed(context(), error))?;
        }
        Ok(())
    }
}

/// Whether an errno says that there is nothing to remove any more.
pub(super) fn is_gone(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

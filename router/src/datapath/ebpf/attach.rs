//! Attaching the programs to the ingress of an interface.

use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::programs::links::{FdLink, Link as _, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, TcError, tc};
use router_ebpf::abi::Side;

use super::pins::Pins;
use super::{clsact, errno, failed, refused};
use crate::datapath::{Error, Link};

/// Priority of our clsact filters: behind those of others, as with tcx. (The kernel's own choice
/// begins at 49152 and goes down.)
const PRIORITY: u16 = 50_000;

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// A tcx link: gone with the daemon's file descriptor unless it is pinned (Linux 6.6).
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

/// Whose programs are attached.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner<'a> {
    /// Handle of the filters, see [`clsact::handle`].
    pub(super) handle: u32,
    /// Where attachments to the subnet side are pinned, if they are.
    pub(super) pins: Option<&'a Pins>,
}

/// A program on an interface.
#[derive(Debug)]
pub(super) struct Attachment {
    program: &'static str,
    link: Link,
    held: SchedClassifierLink,
    /// Where it is pinned.
    pin: Option<PathBuf>,
    /// Whether the clsact qdisc is ours too.
    made_qdisc: bool,
}

/// Attaches `program` to the ingress of `link`, in place of one that an earlier run left there.
/// While `mode` is open, what works decides it.
pub(super) fn attach(
    programs: &mut aya::Ebpf,
    mode: &mut Option<AttachMode>,
    program: &'static str,
    link: &Link,
    owner: Owner<'_>,
) -> Result<Attachment, Error> {
    let attached = |held, pin, made_qdisc| Attachment {
        program,
        link: link.clone(),
        held,
        pin,
        made_qdisc,
    };
    if *mode != Some(AttachMode::Clsact) {
        // The TUN device takes its program with it.
        let pins = owner.pins.filter(|_| program == Side::Subnet.program());
        let pin = pins.map(|pins| pins.link(link.index));
        match attach_tcx(programs, program, link, pin) {
            // Kernels before 6.6 do not know the attach type.
            Err(error) if mode.is_none() && errno(&error) == Some(libc::EINVAL) => {}
            outcome => {
                let (held, pin) = outcome
                    .map_err(|error| refused(context(program, link, AttachMode::Tcx), error))?;
                *mode = Some(AttachMode::Tcx);
                return Ok(attached(held, pin, false));
            }
        }
    }
    if mode.is_none() {
        *mode = Some(AttachMode::Clsact);
        tracing::debug!("the kernel has no tcx: programs are attached by clsact");
    }
    let (held, made_qdisc) = attach_clsact(programs, program, link, owner.handle)?;
    Ok(attached(held, None, made_qdisc))
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

/// Attaches a program, and pins the attachment at `pin`; tells where it is pinned now.
fn attach_tcx(
    programs: &mut aya::Ebpf,
    program: &str,
    link: &Link,
    pin: Option<PathBuf>,
) -> Result<(SchedClassifierLink, Option<PathBuf>), ProgramError> {
    let program = classifier(programs, program)?;
    // Behind the programs of others: a firewall or a monitor of the operator's goes on to see
    // what it saw.
    let fresh = |program: &mut SchedClassifier| {
        let id = program.attach_with_options(
            &link.name,
            TcAttachType::Ingress,
            TcAttachOptions::TcxOrder(LinkOrder::last()),
        )?;
        program.take_link(id)
    };
    let Some(pin) = pin else {
        return Ok((fresh(program)?, None));
    };
    if pin.exists() {
        match replace_pinned(program, &pin) {
            Ok(held) => return Ok((held, Some(pin))),
            // The interface that had this index is gone.
            Err(error) => tracing::debug!(%error, link = %link.name, "an attachment is void"),
        }
        fs::remove_file(&pin).map_err(TcError::IoError)?;
    }
    match pinned(fresh(program)?, &pin) {
        Ok(held) => Ok((held, Some(pin))),
        Err(error) => {
            tracing::warn!(
                %error,
                link = %link.name,
                "the attachment cannot be pinned: connections break when the daemon restarts"
            );
            Ok((fresh(program)?, None))
        }
    }
}

/// Puts `program` in the place of the one whose attachment is pinned; no packet is missed, none is
/// seen by both.
fn replace_pinned(
    program: &mut SchedClassifier,
    pin: &Path,
) -> Result<SchedClassifierLink, Box<dyn StdError>> {
    let held = FdLink::from(PinnedLink::from_pin(pin)?);
    let id = program.attach_to_link(held.try_into()?)?;
    Ok(program.take_link(id)?)
}

fn pinned(held: SchedClassifierLink, pin: &Path) -> Result<SchedClassifierLink, Box<dyn StdError>> {
    let held = FdLink::try_from(held)?.pin(pin)?;
    Ok(FdLink::from(held).try_into()?)
}

/// Attaches a program; tells whether the qdisc is ours.
fn attach_clsact(
    programs: &mut aya::Ebpf,
    program: &'static str,
    link: &Link,
    handle: u32,
) -> Result<(SchedClassifierLink, bool), Error> {
    let context = || context(program, link, AttachMode::Clsact);
    let mut attach = |left: bool| {
        let classifier = classifier(programs, program)?;
        let id = if left {
            let left = SchedClassifierLink::attached(
                &link.name,
                TcAttachType::Ingress,
                PRIORITY,
                handle.into(),
                None,
            );
            classifier.attach_to_link(left.map_err(TcError::IoError)?)?
        } else {
            let options = NlOptions {
                priority: PRIORITY,
                handle: handle.into(),
                classid: None,
            };
            classifier.attach_with_options(
                &link.name,
                TcAttachType::Ingress,
                TcAttachOptions::Netlink(options),
            )?
        };
        classifier.take_link(id)
    };
    let left = clsact::is_attached(link.index, program, handle);
    if left.map_err(|error| failed(context(), error))? {
        // Empty, the qdisc does nothing for anybody, whoever made it.
        let held = attach(true).map_err(|error: ProgramError| refused(context(), error))?;
        return Ok((held, true));
    }
    let made_qdisc = match tc::qdisc_add_clsact(&link.name) {
        Ok(()) => true,
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => false,
        Err(error) => return Err(refused(context(), error)),
    };
    match attach(false) {
        Ok(held) => Ok((held, made_qdisc)),
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
    pub(super) fn detach(self) -> Result<(), Error> {
        let context = || format!("detach {} from {}", self.program, self.link.name);
        if let Some(pin) = &self.pin {
            match fs::remove_file(pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(context(), error));
                }
                _ => {}
            }
        }
        match self.held.detach() {
            Err(error) if !is_gone(errno(&error)) => return Err(failed(context(), error)),
            _ => {}
        }
        if self.made_qdisc {
            clsact::remove_if_empty(self.link.index).map_err(|error| failed(context(), error))?;
        }
        Ok(())
    }

    /// Lets go of the program, and leaves it where it is if that is on the subnet side.
    pub(super) fn leave(self) -> Result<(), Error> {
        if self.program != Side::Subnet.program() {
            return self.detach();
        }
        if self.pin.is_none() {
            // aya removes the filter of a link that is dropped.
            std::mem::forget(self.held);
        }
        Ok(())
    }
}

/// Whether an errno says that there is nothing to remove any more.
pub(super) fn is_gone(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

//! The container image: from nothing, one layer, one index for all processors (OCI image
//! specification 1.1).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Arch, Build, VERSION, binary, gzip, open_folders, tar, text, write};
use crate::run;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What the image is called where it is taken from a file, with the version as its tag.
const NAME: &str = "localhost/sluice";

/// What the root has besides the binary: mount points, and where the configuration is looked for. The
/// certificates of the public authorities are in the binary.
const FOLDERS: [&str; 7] = [
    "etc/sluice/sluice.d",
    "dev",
    "proc",
    "run",
    "sys/fs/bpf",
    "tmp",
    "var/lib/sluice",
];

/// A blob, as other documents refer to it.
struct Blob {
    media_type: &'static str,
    digest: String,
    size: u64,
}

impl Blob {
    /// The members of a descriptor.
    fn members(&self) -> String {
        format!(
            r#""mediaType":"{}","digest":"{}","size":{}"#,
            self.media_type, self.digest, self.size
        )
    }
}

/// Makes the image for these processors. Returns its folder, and the one file that holds the same.
pub(super) fn make(build: &Build, arches: &[Arch]) -> Result<Vec<PathBuf>> {
    let layout = build.empty("sluice-oci")?;
    let mut images = Vec::new();
    for arch in arches {
        images.push(format!(
            r#"{},"platform":{{"architecture":"{}","os":"linux"}}"#,
            image(build, *arch, &layout)?.members(),
            arch.name()
        ));
    }
    // Podman and skopeo take a layout that has a single image, and that may be an index for several processors. Proxmox
    // wants the image itself.
    let only = match &images[..] {
        [only] => only.clone(),
        all => add(&layout, INDEX, Source::Text(&index(all)))?.members(),
    };
    let named = format!(
        r#"{only},"annotations":{{"io.containerd.image.name":"{NAME}:{VERSION}","org.opencontainers.image.ref.name":"{VERSION}"}}"#
    );
    write(&layout.join("index.json"), index(&[named]), 0o644)?;
    let version = r#"{"imageLayoutVersion":"1.0.0"}"#;
    write(&layout.join("oci-layout"), version, 0o644)?;
    open_folders(&layout)?;
    let names: Vec<&str> = arches.iter().map(|arch| arch.name()).collect();
    let name = format!("sluice_{}_{}.oci.tar", build.version(), names.join("-"));
    let file = build.folder.join(name);
    // Proxmox takes no members that begin with `./`.
    tar(
        build,
        &layout,
        &["oci-layout", "index.json", "blobs"],
        &file,
    )?;
    Ok(vec![layout, file])
}

/// An index of descriptors, of which these are the members.
fn index(descriptors: &[String]) -> String {
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{{}}}]}}"#,
        descriptors.join("},{")
    )
}

/// Adds the image for one processor to the layout, and returns its manifest.
fn image(build: &Build, arch: Arch, layout: &Path) -> Result<Blob> {
    let root = build.empty(&format!("root-{}", arch.name()))?;
    let program = binary::build(build, arch)?;
    let bytes = fs::read(&program).with_context(|| program.display().to_string())?;
    write(&root.join("usr/bin/sluice"), bytes, 0o755)?;
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        write(&root.join("licenses").join(licence), text(licence)?, 0o644)?;
    }
    let notices = super::notices::text(arch)?;
    write(&root.join("licenses/THIRD-PARTY"), notices, 0o644)?;
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder)).context(folder)?;
    }
    // `wg` and others look for sockets there.
    symlink("../run", root.join("var/run")).context("var/run")?;
    open_folders(&root)?;
    let layer = build.folder.join(format!("layer-{}.tar", arch.name()));
    let mut members = Vec::new();
    let entries = binary::files(&root)?;
    for entry in &entries {
        let name = entry.file_name().and_then(|name| name.to_str());
        members.push(name.context("odd name")?);
    }
    tar(build, &root, &members, &layer)?;
    let unpacked = digest(&layer)?;
    let layer = gzip(&layer)?;
    let layer = add(layout, LAYER, Source::File(&layer))?;

    let created = build.date("+%Y-%m-%dT%H:%M:%SZ")?;
    let labels = format!(
        r#""org.opencontainers.image.title":"sluice","org.opencontainers.image.version":"{VERSION}","org.opencontainers.image.licenses":"MIT OR Apache-2.0""#
    );
    let config = format!(
        r#"{{"created":"{created}","architecture":"{}","os":"linux","config":{{"Env":["PATH=/usr/bin"],"Entrypoint":["/usr/bin/sluice"],"Cmd":["run"],"Volumes":{{"/var/lib/sluice":{{}}}},"WorkingDir":"/","StopSignal":"SIGTERM","Labels":{{{labels}}}}},"rootfs":{{"type":"layers","diff_ids":["{unpacked}"]}},"history":[{{"created":"{created}","created_by":"cargo xtask package oci"}}]}}"#,
        arch.name()
    );
    let config = add(layout, CONFIG, Source::Text(&config))?;
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{{}}},"layers":[{{{}}}]}}"#,
        config.members(),
        layer.members()
    );
    add(layout, MANIFEST, Source::Text(&manifest))
}

/// Where a blob comes from.
enum Source<'a> {
    /// A file, which goes into the layout.
    File(&'a Path),
    Text(&'a str),
}

/// Adds a blob under the name of its digest.
fn add(layout: &Path, media_type: &'static str, source: Source<'_>) -> Result<Blob> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).context("blobs/sha256")?;
    let draft = blobs.join("draft");
    match source {
        Source::File(file) => {
            let bytes = fs::read(file).with_context(|| file.display().to_string())?;
            write(&draft, bytes, 0o644)?;
            fs::remove_file(file).with_context(|| file.display().to_string())?;
        }
        Source::Text(text) => write(&draft, text, 0o644)?,
    }
    let digest = digest(&draft)?;
    let size = draft.metadata().context("size of a blob")?.len();
    let (_, hex) = digest.split_once(':').context("odd digest")?;
    fs::rename(&draft, blobs.join(hex)).context("name of a blob")?;
    Ok(Blob {
        media_type,
        digest,
        size,
    })
}

/// `sha256:` and the digest of a file in hexadecimal digits.
fn digest(file: &Path) -> Result<String> {
    let line = run::read(run::command("sha256sum").arg("--binary").arg(file))?;
    let hex = line.split_whitespace().next().context("no digest")?;
    Ok(format!("sha256:{}", hex.trim_start_matches('\\')))
}
